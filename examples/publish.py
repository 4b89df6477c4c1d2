"""Pushes the folder of a model to the Hub, and verifies it by loading it back.

    python examples/publish.py model_cards/joint-mae-tiny org/joint-mae-tiny

The folder is exactly what the repository will hold; `python -m jointmae_hf.publishing card` makes one. Log in first,
with `hf auth login`. A repository that is made is private unless `--public` is given.
"""

import argparse
import logging
import sys

import transformers

from jointmae_hf.publishing import PublishingError, publish_folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="folder of a model")
    parser.add_argument("repo_id", help="repository on the Hub, owner/name")
    parser.add_argument("--public", action="store_true", help="make it public, if it is made")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("jointmae_hf").setLevel(logging.INFO)  # not every request of the Hub's client
    transformers.logging.set_verbosity_error()  # errors say what its reports on loading show
    try:
        print(publish_folder(arguments.folder, arguments.repo_id, not arguments.public, arguments.revision))
    except PublishingError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
