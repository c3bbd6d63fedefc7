"""Public weights: their licence, and the command to download them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PUBLIC_CHECKPOINT: Final = "MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric"
WEIGHTS_LICENCE: Final = (
    "MASt3R's weights are licensed CC BY-NC-SA 4.0, for non-commercial use only."
    " The data sets they were trained on add terms of their own, listed in the CHECKPOINTS_NOTICE"
    " of https://github.com/naver/mast3r."
)


def download_command(folder: Path = Path("checkpoints")) -> str:
    """The command with which a user fetches the public checkpoint (2.8 GB) into ``folder``.

    The checkpoint's name is kept in the path: it says that lengths are metric.
    """
    return f"hf download naver/{PUBLIC_CHECKPOINT} --local-dir {folder / PUBLIC_CHECKPOINT}"
