"""An artifact with the folder its files lie in: the record says what, this says where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekd.errors import BundleError
from edgekd.records import Artifact, Format, IOSpec, Precision
from edgekd.storage import copy_file, sha256_file


@dataclass(frozen=True)
class StoredArtifact:
    """`record` describes the files, `folder` holds them."""

    record: Artifact
    folder: Path

    @property
    def entry(self) -> Path:
        """The file that a runtime opens."""
        return self.folder / self.record.entry

    def verify(self) -> None:
        """Compare every file with its hash; call before an artifact that came from outside runs.

        Raises:
            BundleError: a file is missing or was changed.
        """
        for name, expected in self.record.files.items():
            path = self.folder / name
            if not path.is_file():
                raise BundleError(f"the artifact's file {name} is missing", found=str(path), hint="restore it from where the artifact was built", subject=name)
            found = sha256_file(path)
            if found != expected:
                raise BundleError(
                    f"the artifact's file {name} was changed", found=found[:16], allowed=expected[:16], hint="restore it, or build it again", subject=name
                )

    def copy_to(self, folder: Path) -> StoredArtifact:
        """The same artifact in another folder."""
        for name in self.record.files:
            copy_file(self.folder / name, folder / name)
        return StoredArtifact(self.record, folder)


def store_artifact(
    folder: Path,
    entry: str,
    *,
    format: Format,
    precision: Precision,
    iospec: IOSpec,
    opset: int = 0,
    producers: Mapping[str, str] | None = None,
    parent: str = "",
    recipe: str = "",
    metadata: Mapping[str, str] | None = None,
    extra_files: tuple[str, ...] = (),
) -> StoredArtifact:
    """The artifact made of `entry` and `extra_files`, which already lie in `folder`; hashes and size are taken here."""
    names = (entry, *extra_files)
    record = Artifact(
        files={name: sha256_file(folder / name) for name in names},
        entry=entry,
        format=format,
        precision=precision,
        iospec=iospec,
        size_bytes=sum((folder / name).stat().st_size for name in names),
        opset=opset,
        producers=dict(producers or {}),
        parent=parent,
        recipe=recipe,
        metadata=dict(metadata or {}),
    )
    return StoredArtifact(record, folder)
