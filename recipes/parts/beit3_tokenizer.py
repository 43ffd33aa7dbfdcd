"""BEiT-3's tokenizer: the sentencepiece model `beit3.spm`, numbered as fairseq does."""

from pathlib import Path

from dtrain.errors import InputError

BOS, PAD, EOS, UNKNOWN = range(4)  # what sentencepiece puts first is <unk> 0, <s> 1, </s> 2: all else moves up by one
WHERE = "It is beside the checkpoints of BEiT-3: github.com/addf400/files/releases/download/beit3/beit3.spm."


class Beit3Tokenizer:
    """Text to ids, between <s> and </s>.

    Args:
        path: The file `beit3.spm`.

    Raises:
        InputError: If there is no such file, if it is no sentencepiece model with the usual first pieces, or if
            sentencepiece is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise InputError(f"there is no tokenizer at {path}. Give `words` or a sentencepiece file. {WHERE}")
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise InputError(f"{path} needs sentencepiece. Install it: pip install 'dtrain[text]'.") from error
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:  # the library says so of whatever it cannot parse
            raise InputError(f"{path} is no sentencepiece model. {WHERE}") from error
        first = (self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id())
        if first != (0, 1, 2):
            raise InputError(f"{path} numbers <unk>, <s> and </s> {first}, and beit3.spm (0, 1, 2). {WHERE}")

    def __len__(self) -> int:
        return len(self.pieces) + 2  # padding, and the mask token at the end

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [BOS, *(piece + 1 if piece else UNKNOWN for piece in self.pieces.encode(text)), EOS]
