"""The error that a command shows as one line. Imports nothing, so what needs no JAX does not load
it for this.
"""


class UserError(Exception):
    """Something the user can mend; the message names the value, the limit and the fix."""
