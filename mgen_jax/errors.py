"""The one exception type for faults a user can fix; commands print it as a sentence and exit.

Everything else that is raised is a bug in mgen_jax and keeps its traceback.
"""


class UserError(Exception):
  """A fault that the user can fix.

  The message is one sentence that names the value at fault, where it comes from and the fix.
  """


class ConfigError(UserError):
  """A key or a value of an experiment that cannot be used."""
