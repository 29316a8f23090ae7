"""What to say of a package that cannot be imported."""

import re

# What the dynamic linker and the kernel say. A full static TLS block is another fault, which more
# memory does not mend.
OUT_OF_MEMORY = re.compile(
    r"failed to map|cannot map|cannot allocate memory(?! in static TLS)|bad_alloc", re.IGNORECASE
)


def import_problem(user: str, error: ImportError, fix: str) -> str:
    """One sentence: `user`, e.g. "OCR engine 'x'", lacks memory, or needs a package that is missing
    or broken, and what to do about it. fix: the command that installs it.
    """
    if OUT_OF_MEMORY.search(str(error)):
        return (
            f"{user} cannot load its packages because there is not enough memory ({error}): free "
            "some, or raise the limit of the process (ulimit -v)"
        )
    if isinstance(error, ModuleNotFoundError):
        return f"{user} needs a package that is missing ({error}): {fix}"
    return f"{user} needs a package that cannot be loaded ({error}): {fix}"
