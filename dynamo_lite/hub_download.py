"""Fetches a model from Hugging Face: `python -m dynamo_lite.hub_download ID REVISION ANSWER`.

The folder's path is written into the file ANSWER. What is in the cache is not fetched again, and serves alone when
the hub cannot be reached.
"""

from __future__ import annotations

import sys
from pathlib import Path

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def main(arguments: list[str]) -> None:
    model, revision, answer = arguments
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(model, revision=revision or None, allow_patterns=WANTED)
    except LocalEntryNotFoundError:
        sys.exit(f"{model} is not in the cache and huggingface.co cannot be reached; connect, or give a folder")
    except GatedRepoError:
        sys.exit(f"{model} needs its licence accepted on huggingface.co and HF_TOKEN set")
    except RevisionNotFoundError:
        sys.exit(f"{model} has no revision '{revision}' on huggingface.co")
    except RepositoryNotFoundError:
        sys.exit(f"there is no model {model} on huggingface.co that you may see")
    except (HfHubHTTPError, OSError) as error:
        sys.exit(f"{model} could not be downloaded: {str(error).splitlines()[0]}")
    if not (Path(folder) / "config.json").is_file():
        sys.exit(f"{model} was downloaded only in part, and huggingface.co cannot be reached for the rest")
    Path(answer).write_text(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
