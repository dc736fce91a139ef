"""Set the validation text apart."""

from collections.abc import Iterable
from decimal import Decimal

from pretrain.errors import DataError, UsageError
from pretrain.text.document import Document


def split_documents(documents: Iterable[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Split documents, in their order, into training and validation: the last ``val_fraction`` of all characters.

    The cut falls at character ``int((1 - val_fraction) * total)``. The document in which it falls stays whole, in
    training, unless it is the last one: that is cut at exactly this character, so that a single file splits as nanoGPT
    and LLMs-from-scratch do it. ``val_fraction`` 0 leaves the validation list empty.

    Raises UsageError for a fraction outside [0, 1), DataError if there is no text or a half would be empty.
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"data.val_fraction is {val_fraction}: it must be at least 0 and below 1, for example 0.1")
    documents = list(documents)
    total = sum(len(document.text) for document in documents)
    if total == 0:
        raise DataError("there is no text to train on; give files that hold some with --data.paths")
    if val_fraction == 0:
        return documents, []
    # In decimals, as 1 - 0.9 in floats is 0.0999...98 and would move the cut by one character.
    cut = int((1 - Decimal(str(val_fraction))) * total)

    training: list[Document] = []
    validation: list[Document] = []
    start = 0
    for number, document in enumerate(documents, start=1):
        end = start + len(document.text)
        if start >= cut:
            validation.append(document)
        elif end <= cut or number < len(documents):
            training.append(document)
        else:
            training.append(Document(document.text[: cut - start], document.source))
            validation.append(Document(document.text[cut - start :], document.source))
        start = end

    if not training or not validation:
        half = "validation" if training else "training"
        raise DataError(
            f"no text is left for {half} ({total:,} characters in {len(documents):,} documents, "
            f"data.val_fraction {val_fraction}); give more text or another data.val_fraction"
        )
    return training, validation
