"""How an RQ-VAE is trained: every parameter has its effect, and a training that was interrupted ends the same."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semids.config import BuildConfig, SweepConfig, make_config
from semids.errors import DataError, UsageError
from semids.quantizers import _rqvae_rows, _rqvae_state, _rqvae_train
from semids.quantizers._rqvae_decoder import DecoderJob, fit_decoder
from semids.quantizers._rqvae_evaluation import evaluate
from semids.quantizers._rqvae_outcome import Trained, freeze_training
from semids.quantizers._rqvae_rows import ResidentRows, StreamedRows, hold_out, open_rows
from semids.quantizers._rqvae_steps import rate_of, reset_moments
from semids.quantizers._rqvae_train import Job, train
from semids.quantizers.base import TrainingData
from semids.quantizers.rqvae import Rqvae, RqvaeSettings
from semids.residual import ResidualCodebooks
from semids.shards import ShardedArray, ShardLayout

SIZES = (8, 6)
SMALL: dict[str, Any] = {
    "layers": (12,),
    "e_dim": 6,
    "batch_size": 100,
    "epochs": 6,
    "warmup_epochs": 2,
    "eval_step": 2,
    "kmeans_iters": 5,
}


class Array(ShardedArray):
    """Vectors in files of 128 rows."""

    def __init__(self, vectors: np.ndarray, folder: Path) -> None:
        layout = ShardLayout(*vectors.shape, str(vectors.dtype), 128)
        for shard in range(layout.shards):
            start, stop = layout.bounds(shard)
            np.save(folder / f"{shard}.npy", vectors[start:stop])
        super().__init__(layout, lambda shard: folder / f"{shard}.npy")


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> Array:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 10))
    rows = centres[rng.integers(0, 30, 500)] + 0.3 * rng.normal(size=(500, 10))
    return Array(rows.astype(np.float32), tmp_path_factory.mktemp("array"))


def job_of(array: ShardedArray, folder: Path | None = None, sizes: tuple[int, ...] = SIZES, **changes: Any) -> Job:
    rows = np.arange(array.layout.rows)
    return Job(sizes, RqvaeSettings(**SMALL | changes), 1, array, rows, folder)


def silently(what: str, done: int, total: int) -> None:
    """Listen to nothing."""


def fit(array: ShardedArray, folder: Path | None = None, **changes: Any) -> Trained:
    return train(job_of(array, folder, **changes), silently)


def save_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rqvae_state, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(_rqvae_state, "CHECKPOINT_SHARE", 1e9)


def figures(trained: Trained) -> tuple[dict[str, bytes], dict[str, Any]]:
    tensors, evidence = freeze_training(trained)
    return {name: value.tobytes() for name, value in tensors.items()}, evidence


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": ()},
        {"layers": (12, 9)},
        {"e_dim": 5},
        {"batch_size": 50},
        {"lr": 3e-3},
        {"epochs": 7},
        {"warmup_epochs": 3},
        {"eval_step": 5},
        {"kmeans_init": False},
        {"kmeans_iters": 1},
        {"sk_epsilons": (0.0, 0.05)},
        {"sk_epsilons": (0.0, 0.05), "sk_iters": 1},
        {"beta": 1.0},
        {"quant_loss_weight": 0.1},
        {"optimizer": "Adam", "weight_decay": 0.1},
        {"optimizer": "SGD"},
        {"optimizer": "Adagrad"},
        {"optimizer": "RMSprop"},
        {"weight_decay": 0.1},
        {"lr_scheduler": "linear"},
        {"lr_scheduler": "cosine"},
    ],
    ids=str,
)
def test_every_parameter_changes_the_outcome_and_can_be_interrupted(
    changes: dict[str, Any], array: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: what `Training.tensors` and `TrainingState` hold, and the order of rows as a function of the epoch."""
    save_after_every_step(monkeypatch)
    unlike = {"sk_epsilons": (0.0, 0.05)} if "sk_iters" in changes else {}
    whole = figures(fit(array, **changes))
    assert whole != figures(fit(array, **unlike))
    stop = iter(range(1, 1000))

    def give_up(what: str, done: int, total: int) -> None:
        if what == "train" and next(stop) % 7 == 0:
            raise KeyboardInterrupt

    for _ in range(50):
        try:
            again = train(job_of(array, tmp_path / "kept", **changes), give_up)
            break
        except KeyboardInterrupt:
            continue
    assert next(stop) > 25
    assert figures(again) == whole


def test_a_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    array: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_after_every_step(monkeypatch)
    whole = figures(fit(array, tmp_path))
    kept = sorted(tmp_path.glob("*.safetensors"))
    assert len(kept) == 2
    data = bytearray(kept[-1].read_bytes())
    data[len(data) // 2] ^= 1
    kept[-1].write_bytes(data)
    assert figures(fit(array, tmp_path)) == whole
    assert "going on from the checkpoint before it" in caplog.text


def test_a_training_begins_anew_where_every_checkpoint_is_damaged_and_saves_again(
    array: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guard: the numbering in `Checkpoints.load`; without it, new checkpoints are deleted as the oldest."""
    save_after_every_step(monkeypatch)
    whole = figures(fit(array, tmp_path))
    damaged = sorted(path.stem for path in tmp_path.glob("*.json"))
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    steps: list[int] = []

    def give_up(what: str, done: int, total: int) -> None:
        if what == "train":
            steps.append(done)
            if len(steps) % 8 == 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job_of(array, tmp_path), give_up)
    assert "training begins anew" in caplog.text
    assert steps[0] == 100
    assert not {path.stem for path in tmp_path.iterdir()} & set(damaged)
    again: list[int] = []
    trained = train(job_of(array, tmp_path), lambda what, done, total: again.append(done if what == "train" else total))
    assert figures(trained) == whole
    assert again[0] > steps[-2]


def test_a_revived_codeword_steps_as_far_as_others() -> None:
    """Guard: `reset_moments`; with moments of zero, AdamW would take its first steps 1.6 to 3.3 times as far."""
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad):
        book = torch.nn.Parameter(torch.zeros(6, 3))
        optimizer = kind([book], lr=0.1)
        for step in range(200):
            if step == 199:
                before = book.detach().clone()
                reset_moments(optimizer.state[book], torch.tensor([1, 4]))
            book.grad = torch.ones_like(book)
            optimizer.step()
        moved = (book.detach() - before).abs().mean(dim=1)
        assert (moved[[1, 4]] <= 1.01 * moved[0]).all(), kind
        assert (moved[[1, 4]] > 0).all()


def test_the_best_weights_are_those_of_the_evaluation_that_judges_best(array: Array) -> None:
    trained = fit(array, epochs=60, lr=0.02, patience=0, best_by="mse")
    errors = {found["epoch"]: found["relative_mse"] for found in trained.state.evaluations}
    assert trained.state.best == min(errors, key=lambda epoch: errors[epoch])
    assert len(errors) == 29
    _, held_out = hold_out(np.arange(500), seed=1)
    again = evaluate(trained.model, array, held_out, batch_size=100)
    assert again["relative_mse"] == errors[trained.state.best]
    by_collisions = fit(array, epochs=60, lr=0.02, patience=0, best_by="collisions").state
    keys = {found["epoch"]: (found["excess_collisions"], found["relative_mse"]) for found in by_collisions.evaluations}
    assert by_collisions.best == min(keys, key=lambda epoch: keys[epoch])


def test_patience_ends_a_training_that_gets_no_better(array: Array) -> None:
    told: list[tuple[str, int, int]] = []
    job = job_of(array, epochs=400, lr=0.05, patience=2)
    state = train(job, lambda *given: told.append(given)).state
    assert state.epoch < 400
    # Progress ends at 100 %, with the rows that it took.
    assert told[-2:] == [("train", 475 * state.epoch, 475 * total) for total in (400, state.epoch)]
    assert state.epoch - state.best == 2 * SMALL["eval_step"]


def test_evaluations_say_what_a_person_needs(array: Array) -> None:
    trained = fit(array, sk_epsilons=(0.0, 0.05), epochs=20)
    last = trained.state.evaluations[-1]
    zeros = {f"potentials_{level}": np.zeros(size, np.float32) for level, size in enumerate(SIZES, start=1)}
    frozen = Rqvae.freeze(freeze_training(trained)[0] | zeros)
    _, held_out = hold_out(np.arange(500), seed=1)
    rows = array.take(held_out)
    assert trained.state.best == last["epoch"]
    codes = frozen.encode(rows)
    error = frozen.squared_errors(rows, codes)[:, -1].sum() / ((rows - rows.mean(axis=0)) ** 2).sum()
    assert last["relative_mse"] == pytest.approx(error, rel=1e-4)
    assert last["excess_collisions"] == len(rows) - len(np.unique(codes, axis=0))
    assert last["contents"] == len(held_out) == 25
    assert last["collision_rate"] >= last["floor"] == 0
    assert 0 < last["agreement"] < 1
    assert len(last["codes_used"]) == len(last["perplexity"]) == len(last["dead_codes"]) == 2
    assert fit(array).state.evaluations[-1]["agreement"] == 1


def test_dead_codewords_are_moved_to_where_rows_are_and_counted(array: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without k-means all small random codewords but one or two would stay dead."""
    changes: dict[str, Any] = {"kmeans_init": False, "epochs": 10, "patience": 0, "sizes": (64, 32)}
    alive = fit(array, **changes).state
    assert sum(alive.revived) > 0
    monkeypatch.setattr(_rqvae_train._Trainer, "_revive", lambda self, dead: None)
    dead = fit(array, **changes).state
    assert dead.revived == [0, 0]
    unused = [sum(state.evaluations[-1]["dead_codes"]) for state in (alive, dead)]
    assert unused[0] < 0.5 * unused[1], unused


def test_a_loss_that_is_no_number_names_the_contents_of_its_batch(array: Array) -> None:
    message = r"the loss of epoch 1, step 2 is no number .* its batch has the contents \[\d+, .* and 95 more; lower lr"
    with pytest.raises(DataError, match=message):
        fit(array, optimizer="SGD", lr=1e30, warmup_epochs=0)


def test_rows_that_are_all_the_same_still_train(tmp_path: Path) -> None:
    rows = np.ones((60, 10), np.float32)
    evidence = freeze_training(fit(Array(rows, tmp_path)))[1]
    assert evidence["evaluations"][-1]["relative_mse"] is None


def test_few_rows_judge_themselves(tmp_path: Path) -> None:
    trained = fit(Array(np.random.default_rng(0).normal(size=(7, 10)).astype(np.float32), tmp_path))
    assert trained.rows == trained.held_out == 7


def test_resident_rows_are_the_streamed_ones(array: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.array([0, 3, 127, 128, 400])
    rows = np.arange(20, 460)
    cpu = torch.device("cpu")
    assert torch.equal(ResidentRows(array, rows, cpu).read(places), StreamedRows(array, rows, cpu).read(places))
    assert isinstance(open_rows(array, rows, cpu, needed=0), StreamedRows)
    streamed = figures(fit(array))
    monkeypatch.setattr(_rqvae_train, "open_rows", lambda *given, needed: ResidentRows(*given))
    assert figures(fit(array)) == streamed


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]), ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5]),
     ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.853553, 0.5])],
)  # fmt: skip
def test_the_learning_rate_rises_and_then_follows_its_schedule(scheduler: Any, rates: list[float]) -> None:
    settings = RqvaeSettings(epochs=4, warmup_epochs=2, lr_scheduler=scheduler)
    found = [rate_of(settings, step, 2) for step in range(7)]
    assert found == pytest.approx(rates, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sk_epsilons": [0.0, 0.01]}, r"sk_epsilons for each of the 3 levels of 8x8x8, or none, got 2"),
        ({"sk_epsilons": [0.0, 1e-40, 0.0]}, r"expected 0 or at least 0\.0001"),
        ({"sk_epsilons": [0.0, 0.0, float("inf")]}, r"sk_epsilons\.2: Input should be a finite number"),
        ({"epochs": 10, "warmup_epochs": 10}, "expected more epochs than warmup_epochs"),
        ({"layers": [0]}, r"options\.rqvae\.layers\.0: Input should be greater than or equal to 1"),
        ({"optimizer": "Muon"}, r"options\.rqvae\.optimizer: Input should be 'AdamW'"),
        ({"num_emb_list": [8]}, r"options\.rqvae\.num_emb_list: Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(options: dict[str, Any], message: str) -> None:
    values = {"catalogue": {"path": "items.npy"}, "options": {"rqvae": options}}
    build = {**values, "shape": "8x8x8", "quantizer": "rqvae"}
    sweep = {**values, "shapes": ["8x8x8"], "quantizers": ["rqvae"]}
    with pytest.raises(UsageError, match=message):
        make_config(BuildConfig, build, source="here")
    with pytest.raises(UsageError, match=message):
        make_config(SweepConfig, sweep, source="here")


def test_more_epochs_than_shown_follow_in_an_order_of_their_own() -> None:
    first, second, again = (_rqvae_rows.epoch_order(1000, epoch, seed=0) for epoch in (0, 1, 0))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(second), np.arange(1000))
    ahead = list(_rqvae_rows.epoch_orders(1000, range(1, 4), seed=0))
    assert len(ahead) == 3
    assert all(np.array_equal(order, _rqvae_rows.epoch_order(1000, 1 + i, seed=0)) for i, order in enumerate(ahead))


def test_the_next_order_is_drawn_while_an_epoch_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = threading.Event()
    epoch_order = _rqvae_rows.epoch_order

    def watched(rows: int, epoch: int, *, seed: int) -> Any:
        if epoch == 1:
            drawn.set()
        return epoch_order(rows, epoch, seed=seed)

    monkeypatch.setattr(_rqvae_rows, "epoch_order", watched)
    next(_rqvae_rows.epoch_orders(10, range(2), seed=0))
    assert drawn.wait(30)


# First weights and last losses of small trainings, by version. A difference means that networks trained before are no
# longer what this code trains: raise Rqvae.version and store the new numbers beside it.
WATCHED: list[dict[str, Any]] = [
    {},
    {"sk_epsilons": (0.0, 0.05), "kmeans_init": False, "lr_scheduler": "cosine", "epochs": 10, "sizes": (64, 32)},
]
STORED: dict[int, list[list[float]]] = {
    3: [[-0.423221, -0.205454, 0.231873, 0.987855, 0.100733], [-0.423215, -0.204237, 0.23714, 0.983052, 0.046884]]
}


@pytest.mark.parametrize("which", [0, 1])
def test_the_version_is_raised_when_trained_networks_change(
    which: int, array: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    # Another device rounds otherwise.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("semids.kmeans.accelerator", lambda: None)
    trained = fit(array, **WATCHED[which])
    tensors, evidence = freeze_training(trained)
    assert bool(sum(trained.state.revived)) == (which == 1)
    found = [*(float(value) for value in tensors["encoder_weight_1"][0, :3]), *evidence["losses"][-1]]
    np.testing.assert_allclose(found, STORED[Rqvae.version][which], rtol=2e-3, err_msg="raise Rqvae.version")


# The same of the decoder, and Rqvae.decoder_version: its first weights, and its loss. One fit ends with its epochs, one
# with its steps.
WATCHED_DECODERS: list[dict[str, Any]] = [{"epochs": 30}, {"epochs": 30, "batch_size": 1}]
STORED_DECODERS: dict[int, list[list[float]]] = {
    2: [[-0.222253, -0.37859, -0.05683, 0.830642], [-0.160892, -0.309205, 0.000755, 0.667171]],
}


@pytest.mark.parametrize("which", [0, 1])
def test_the_version_is_raised_when_fitted_decoders_change(which: int, array: Array) -> None:
    """The network is drawn, not trained: what changes training leaves the decoder's version as it is."""
    rng = np.random.default_rng(5)
    shapes = {"decoder_weight_1": (6, 12), "decoder_bias_1": (12,), "decoder_weight_2": (12, 10), "mean": (10,)}
    network = {name: (0.3 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    network |= {"decoder_bias_2": np.zeros(10, np.float32), "scale": np.array(0.8, np.float32)}
    books = tuple(rng.normal(size=(size, 6)).astype(np.float32) for size in SIZES)
    codebooks = ResidualCodebooks(books, tuple(np.zeros(size, np.float32) for size in SIZES))
    codes = np.stack([rng.integers(0, size, 500) for size in SIZES], axis=1).astype(np.uint8)
    settings = RqvaeSettings(**SMALL | WATCHED_DECODERS[which])
    data = TrainingData(array, np.arange(0, 500, 3))
    taken: list[tuple[int, int]] = []
    tensors, loss = fit_decoder(
        DecoderJob(network, codebooks, codes, data, settings, 2), lambda *done: taken.append(done)
    )
    assert taken[-1] == ((40, 40), (2000, 2000))[which]
    found = [*(float(value) for value in tensors["decoder_weight_1"][0, :3]), loss]
    stored = STORED_DECODERS[Rqvae.decoder_version][which]
    np.testing.assert_allclose(found, stored, rtol=2e-3, atol=2e-4, err_msg="raise Rqvae.decoder_version")
