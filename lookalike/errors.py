"""Every error a caller may want to catch.

LookalikeError
├── SettingsError          exit code 2: a settings file, an override or a command line is wrong
├── DataError              exit code 3: pictures, shards or vectors are not what they should be
│   └── DecodeError        one picture cannot be decoded; callers count and quarantine it
├── ResourceError          exit code 4: disk, memory, a port, a missing program or package
├── ArtifactError          exit code 5: an artifact is missing, damaged or does not match its parents
│   ├── DamagedArtifact    it cannot be read as it was written
│   │   └── ChecksumMismatch   a file's bytes differ from its manifest
│   └── ManifestMismatch   two artifacts were not made for each other
└── TrainingError          exit code 1
    └── NonFiniteLoss      raised on every rank before weights move
"""


class LookalikeError(Exception):
    """Base of all known errors; its message says what was wrong, what was found, where, and what to do next."""

    exit_code = 1


class SettingsError(LookalikeError):
    exit_code = 2


class DataError(LookalikeError):
    exit_code = 3


class DecodeError(DataError):
    """One picture cannot be turned into RGB pixels.

    `reason` is a short stable word for ledgers: `empty`, `not_an_image`, `truncated`, `too_many_pixels`,
    `absurd_size`, `format_not_allowed`, `unreadable`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ResourceError(LookalikeError):
    exit_code = 4


class ArtifactError(LookalikeError):
    exit_code = 5


class DamagedArtifact(ArtifactError):
    pass


class ChecksumMismatch(DamagedArtifact):
    pass


class ManifestMismatch(ArtifactError):
    pass


class TrainingError(LookalikeError):
    pass


class NonFiniteLoss(TrainingError):
    pass
