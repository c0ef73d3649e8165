"""Where Mergeline itself lies, what publishing leaves in a workspace, and the user's cache."""

import os
from pathlib import Path

# The folder of merging/, evaluation/, tasks/, flows/ and examples/: the repository, into which the package links, or
# the package.
SOURCES = Path(__file__).resolve().parent.parent

# The package: in the repository its links lead to the same folders. DVC takes the repository for a project of its own.
PACKAGE = SOURCES / "mergeline" if (SOURCES / "mergeline").is_dir() else SOURCES

# The link to the package in a workspace that lies elsewhere. DVC leaves out __pycache__ only below its own root, and
# dvc.lock then has the same paths on every machine.
CODE_LINK = ".mergeline-code"

REPORT = Path("build/report.html")


def user_cache() -> Path:
    """Where checkpoints lie that commands outside of workspaces brought or converted, one folder for each.

    $XDG_CACHE_HOME counts if it is an absolute path.
    https://specifications.freedesktop.org/basedir-spec/latest/
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "mergeline"


# In the user's cache.
CACHED_CHECKPOINTS, CACHED_HEADERS, CACHED_DOWNLOADS = "checkpoints", "headers", "downloads"
