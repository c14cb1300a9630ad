"""Errors a person can act on: what was got, what was expected, how to mend it.

Every error survives pickling, because Ray carries it from a worker to the driver.
"""


class CaiError(Exception):
    """A failure that a user can mend; the command line prints it without a traceback.

    Args:
        message: what was got and what was expected.
        fix: one sentence on how to mend it.
    """

    exit_code = 2

    def __init__(self, message: str, fix: str = ""):
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class ConfigError(CaiError):
    """The configuration or a file it names cannot be used."""


class DataError(CaiError):
    """Rows, files or models do not have the form that was expected."""


class ResourceError(CaiError):
    """The machine or cluster cannot hold what was asked for; the message carries the arithmetic."""


class StageFailed(CaiError):
    """A stage stopped after it had begun. What it finished is kept; the same command continues."""

    exit_code = 3
