import wan_jax  # noqa: F401  (what it does about Ctrl-C during imports)
