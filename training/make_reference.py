"""Compute and store the statistics of real images that `evaluate.py --reference` reads.

    python training/make_reference.py --dataset fashion32.npz --split test --output fashion_test.safetensors
    python training/make_reference.py --dataset cifar10 --extractor inception-v3-compat --output cifar10.safetensors
    python training/make_reference.py --dataset user/photographs --resolution 256 --extractor inception-v3-compat \\
        --output photographs.safetensors

`hf upload USER/REPOSITORY cifar10.safetensors --repo-type dataset` publishes one, and `--reference
hf://datasets/USER/REPOSITORY/cifar10.safetensors` reads it.
"""

import argparse

from accelerate import PartialState

from diffusers_onestep.features import EXTRACTORS, load_extractor
from diffusers_onestep.reference import KEPT_FEATURES, Reference


def main(
    dataset: str,
    split: str,
    resolution: int | None,
    extractor: str,
    extractor_weights: str | None,
    features: int,
    output: str,
) -> None:
    if not output.endswith(".safetensors"):
        raise ValueError(f"`output` must end with .safetensors, but is {output!r}.")
    network = load_extractor(extractor, extractor_weights, PartialState().device)
    Reference.load(dataset, network, split, resolution=resolution).save(output, features)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="An .npz file of images or a Hub data set.")
    parser.add_argument("--split", default="test")
    parser.add_argument("--resolution", type=int, help="Pixels: images are resized and their middle cut out.")
    parser.add_argument("--extractor", default="fashion", choices=sorted(EXTRACTORS))
    parser.add_argument("--extractor_weights", help="A local file, or a Hub id or folder.")
    parser.add_argument("--features", type=int, default=KEPT_FEATURES, help="Images whose features are kept, for KID.")
    parser.add_argument("--output", required=True)
    main(**vars(parser.parse_args()))
