"""A folder of trained models, by what they are and by names that people gave."""

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

from trainax_pk._files import LocalFiles
from trainax_pk.experiment._artifact import ARTIFACT, WEIGHTS, read_artifact
from trainax_pk.experiment._operator import Operator, load_operator

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHORTEST = 6


class Registry:
    """Trained models in a folder, each under the digest of what it is.

    `models/DIGEST/` holds artifact and weights; `tags/NAME` the digest that a name
    stands for. What is stored is never changed; tags may move.

    Example:
        >>> import tempfile
        >>> from trainax_pk import experiment
        >>> run = experiment.read_run('''
        ... data: {kind: lorenz_63, num_samples: 10, temporal_horizon: 20}
        ... model: {kind: mlp, width: 8, depth: 1}
        ... configuration: supervised
        ... optimizer: {kind: adam, learning_rate: 1e-3}
        ... training: {num_steps: 10, batch_size: 8}
        ... ''')
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = experiment.train(run, f"{folder}/run")
        ...     registry = experiment.Registry(f"{folder}/registry")
        ...     digest = registry.store(f"{folder}/run", tags=["best"])
        ...     operator = registry.load("best")
        ...     registry.resolve(digest[:8]) == registry.resolve("best"), registry.tags()
        (True, {'best': '...'})
    """

    def __init__(self, root: str | Path) -> None:
        """Opens a folder; makes it when something is stored.

        Args:
            root: The folder.
        """
        self.root = Path(root).expanduser().absolute()
        self._files = LocalFiles(self.root)

    def store(
        self, source: str | Path, *, tags: list[str] | tuple[str, ...] = ()
    ) -> str:
        """Copies a run's artifact and weights.

        Args:
            source: An artifact, or the folder that holds it.
            tags: Names that are to stand for it.

        Returns:
            The model's digest: SHA-256 of its run and its weights' digest. The same model
            has the same one, wherever and whenever it was stored.

        Raises:
            RunFileError: No artifact.
            ArtifactDamaged: Weights that are not the recorded ones.
            ValueError: A tag that is no name.
        """
        for tag in tags:
            _check_tag(tag)
        path = Path(source)
        folder = path if path.is_dir() else path.parent
        artifact = read_artifact(source)
        load_operator(source)  # raises where weights are damaged
        what = {"run": artifact["run"], "weights": artifact["weights"]["sha256"]}
        canonical = json.dumps(what, sort_keys=True).encode()
        digest = hashlib.sha256(canonical).hexdigest()
        self._files.make()
        with self._files.locked(60.0):
            target = self.root / "models" / digest
            if not target.is_dir():
                _copy(folder, target)
        for tag in tags:
            self.tag(digest, tag)
        return digest

    def tag(self, name: str, tag: str) -> None:
        """Lets a tag stand for a model; one that stood for another moves.

        Args:
            name: A digest, the beginning of one, or another tag.
            tag: The new name.

        Raises:
            KeyError: No such model.
            ValueError: A tag that is no name.
        """
        _check_tag(tag)
        digest = self.resolve(name).name
        self._files.write(f"tags/{tag}", digest.encode())

    def tags(self) -> dict[str, str]:
        """Digests by tag."""
        names = [n for n in self._files.names() if n.startswith("tags/")]
        return {n.removeprefix("tags/"): self._files.read(n).decode() for n in names}

    def digests(self) -> list[str]:
        """All models."""
        folder = self.root / "models"
        if not folder.is_dir():
            return []
        # Names with a dot are on their way in.
        return sorted(p.name for p in folder.iterdir() if p.name[0] != ".")

    def resolve(self, name: str) -> Path:
        """The folder of a model.

        Args:
            name: A tag, a digest, or at least six first letters of one.

        Returns:
            The folder, which `load_operator`, `reproduce` and `report` take.

        Raises:
            KeyError: No such model, or several.
        """
        digests = self.digests()
        name = self.tags().get(name, name)
        found = [d for d in digests if d.startswith(name) and len(name) >= _SHORTEST]
        if len(found) != 1:
            raise KeyError(
                f"Expected a tag or the beginning of one digest in {self.root}, got "
                f"{name!r}, which {len(found)} models have. Tags: {sorted(self.tags())}."
            )
        return self.root / "models" / found[0]

    def load(self, name: str) -> Operator:
        """A model, its weights checked.

        Args:
            name: As for `resolve`.

        Returns:
            The operator.

        Raises:
            KeyError: As `resolve`.
            ArtifactDamaged: Weights that are not the recorded ones.
        """
        return load_operator(self.resolve(name))


def _copy(folder: Path, target: Path) -> None:
    """All of it or nothing: a folder that is there is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as new:
        inner = Path(new) / target.name
        inner.mkdir()
        names = [n for n in (WEIGHTS, "metrics.jsonl") if (folder / n).is_file()]
        for name in (ARTIFACT, *names):
            shutil.copyfile(folder / name, inner / name)
        LocalFiles(inner).settle([ARTIFACT, *names])
        inner.rename(target)


def _check_tag(tag: str) -> None:
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise ValueError(
            f"Expected a tag of letters, digits, dots, dashes and underscores, got "
            f"{tag!r}. Choose such a name."
        )
