"""The error that a command prints as one line. In a module without imports, for code that must not
load JAX.
"""


class UserError(Exception):
    """An error that the user can fix; the message names the value, the limit and the fix."""
