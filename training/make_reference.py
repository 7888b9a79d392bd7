"""Compute and store the reference statistics behind FD-fashion.

python training/make_reference.py --dataset fashion32.npz --split test --output fashion_test.safetensors
"""

import argparse

from safetensors.torch import save_file

from diffusers_onestep.data import load_images
from diffusers_onestep.features import FashionCNN
from diffusers_onestep.metrics import moments


def main(dataset: str, split: str, output: str) -> None:
    images = load_images(dataset, split).images
    mean, covariance = moments(FashionCNN.from_shipped()(images)[0])
    save_file({"mean": mean, "covariance": covariance}, output, {"images": f"{len(images)} {split} images"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="An .npz file or a Hub data set.")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", required=True)
    main(**vars(parser.parse_args()))
