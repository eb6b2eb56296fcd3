"""Models may be opened by several threads of a process, as when one is imported while another loads."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from transformers import PreTrainedModel

from models.checkpoints.open_decoder import load_transformers
from models.store.progress import no_progress
from tests.hf_folders import write_folder

CPU = torch.device("cpu")


def test_models_that_are_opened_at_the_same_time_have_their_weights(tmp_path: Path) -> None:
    """Two unguarded threads leave transformers without the tying of weights within a few attempts."""
    folder = tmp_path / "model"
    write_folder(folder, "qwen3")  # its embedding is its output layer, too
    tie_weights, errors = PreTrainedModel.tie_weights, list[str]()

    def open_it() -> None:
        for _ in range(5):
            model = load_transformers(folder, CPU, "float32", no_progress)
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
            if head.weight is not embedding.weight:  # type: ignore[union-attr]
                errors.append("not tied")

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert PreTrainedModel.tie_weights is tie_weights
    assert torch.get_default_dtype() == torch.float32
