"""What can be wrong with an image; each ``str()`` is one line that says what to do."""

from __future__ import annotations

from gcsagent.host.errors import HostError


class ImageError(HostError):
    """Base of all."""


class NotFound(ImageError):
    """No such file, tag or cached image."""


class NoFile(NotFound):
    """There is no file of that name; it may mean something else."""


class Ambiguous(ImageError):
    """There are several to choose from."""


class Unsupported(ImageError):
    """An image of a kind that cannot be used here: its format, media type or platform."""


class Damaged(ImageError):
    """It contradicts itself: a wrong digest or size, something missing, or what is no document at all."""


class Refused(ImageError):
    """A layer holds what no layer should: names that lead out of it, members of unknown kinds."""


class TooLarge(ImageError):
    """It is larger than allowed, or unpacks to more."""


class Busy(ImageError):
    """Somebody else uses it."""


class CannotUnpack(ImageError):
    """This machine cannot: no space, a missing tool, no permission."""
