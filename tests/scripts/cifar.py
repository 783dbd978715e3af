"""A CIFAR-10 of a few images, in its binary layout, for the scripts that train on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_cifar(root: Path, images_per_file: int, contrast: int) -> Path:
    """Write the six files: noise in which each class is brighter by `contrast` in rows of its own.

    The reader has to be told of the size: `torchbp.data.cifar10.IMAGES_PER_FILE`.
    """
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        labels = np.arange(images_per_file) % 10
        images = random.integers(0, 200, (images_per_file, 3, 32, 32))
        for image, label in zip(images, labels, strict=True):
            image[:, 3 * label : 3 * label + 3] += contrast
        records = np.concatenate([labels[:, None], images.reshape(images_per_file, 3072)], axis=1)
        (folder / f"{name}.bin").write_bytes(records.astype(np.uint8).tobytes())
    names = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"
    (folder / "batches.meta.txt").write_text(names)
    return root
