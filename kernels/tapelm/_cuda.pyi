import numpy as np

class Stage:
    def __init__(
        self, batch_size: int, seq_len: int, token_bytes: int, end_of_text: int, packed: bool
    ) -> None: ...
    def assemble(
        self,
        rows: np.ndarray,
        lengths: np.ndarray,
        inputs: int,
        targets: int,
        document_ids: int,
        stream: int,
    ) -> None: ...
