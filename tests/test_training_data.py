"""Data: blocks of tokens, masks that do not depend on batches, metrics, tokenizers."""

import evaluate
import numpy as np
import pytest
import sentencepiece
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from sklearn import metrics as sklearn_metrics
from transformers import AutoTokenizer, EvalPrediction

from training import metrics
from training.arguments import DataArguments
from training.data import MaskingCollator, blocks, load_raw, text_splits
from training.evaluate.rows import Perplexity, TaskMetric, for_trainer
from training.metrics import METRICS, GlueMetric
from training.tasks import GLUE_COLUMNS, encode, find_task, select_splits
from training.tokenization import sentencepiece_tokenizer
from training_helpers import save_bert, save_gpt2, sentences, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def wordpiece(folder):
    return AutoTokenizer.from_pretrained(save_bert(folder / "bert"))


@pytest.fixture(scope="module")
def byte_level(folder):
    return AutoTokenizer.from_pretrained(save_gpt2(folder / "gpt2"))


def test_blocks_hold_the_joined_documents_in_order(byte_level):
    texts = sentences(50)
    cut = blocks(Dataset.from_dict({"text": texts}), byte_level, DataArguments(), 8, split="train")
    joined = [token for text in texts for token in byte_level(text).input_ids]
    assert [token for row in cut["input_ids"] for token in row] == joined[: len(joined) // 8 * 8]
    limited = blocks(
        Dataset.from_dict({"text": texts}), byte_level, DataArguments(max_train_samples=3), 8, split="train"
    )
    assert limited["input_ids"][:] == cut["input_ids"][:3]


def test_a_limit_tokenizes_no_more_documents_than_it_takes(byte_level, monkeypatch):
    corpus = Dataset.from_dict({"text": sentences(5000)})
    whole = blocks(corpus, byte_level, DataArguments(), 8, split="train")["input_ids"][:]
    seen = []
    real = type(byte_level).__call__
    monkeypatch.setattr(type(byte_level), "__call__", lambda self, texts: seen.append(len(texts)) or real(self, texts))
    for limit, documents in ((1, 1000), (len(whole) // 4, 2000), (len(whole) // 2, 3000), (10**6, 5000)):
        seen.clear()
        limited = blocks(corpus, byte_level, DataArguments(max_train_samples=limit), 8, split="train")
        assert limited["input_ids"][:] == whole[:limit]
        assert 0 < sum(seen) <= documents, limit
    broken = Dataset.from_dict({"text": [*sentences(1500), None]})
    with pytest.raises(ValueError, match="got None in row 1500 of split 'train'"):
        blocks(broken, byte_level, DataArguments(max_train_samples=10**6), 8, split="train")


def test_a_stream_gives_the_same_blocks_without_end(byte_level):
    corpus = Dataset.from_dict({"text": sentences(50)})
    cut = blocks(corpus, byte_level, DataArguments(), 8, split="train")["input_ids"][:]
    stream = corpus.to_iterable_dataset()
    once = blocks(stream, byte_level, DataArguments(), 8, split="validation")
    assert [row["input_ids"] for row in once] == cut
    endless = iter(blocks(stream, byte_level, DataArguments(), 8, split="train", seed=1))
    assert sum(1 for _, row in zip(range(3 * len(cut)), endless, strict=False) if row) == 3 * len(cut)


def test_a_text_shorter_than_a_block_is_an_error(byte_level):
    with pytest.raises(ValueError, match="`--block_size`"):
        blocks(Dataset.from_dict({"text": ["good"]}), byte_level, DataArguments(), 8, split="train")


def test_without_a_validation_split_a_part_of_training_is_held_out(folder):
    data = DataArguments(train_file=write_corpus(folder / "corpus.json", 100), validation_split_percentage=10)
    raw = load_raw(data)
    splits = text_splits(raw, data, True, True)
    assert (len(splits["train"]), len(splits["validation"])) == (90, 10)
    assert splits["train"]["text"][:] + splits["validation"]["text"][:] == raw["train"]["text"][:]


@pytest.mark.parametrize("kind", ["txt", "csv", "json", "parquet", "saved", "folder", "subfolder"])
def test_every_kind_of_source_gives_the_same_rows(kind, tmp_path):
    texts = sentences(20)
    dataset = Dataset.from_dict({"text": texts})
    file = tmp_path / f"train.{kind}"
    data = DataArguments(train_file=str(file))
    if kind == "txt":
        file.write_text("\n".join(texts))
    elif kind in ("csv", "json", "parquet"):
        getattr(dataset, f"to_{kind}")(file)
    elif kind == "saved":
        DatasetDict(train=dataset).save_to_disk(tmp_path / "saved")
        data = DataArguments(dataset_name=str(tmp_path / "saved"))
    else:
        (tmp_path / "sub").mkdir()
        dataset.to_parquet(tmp_path / "sub" / "train.parquet")
        within = {"folder": "sub", "subfolder": ""}[kind]
        data = DataArguments(
            dataset_name=str(tmp_path / within), dataset_config_name="sub" if kind == "subfolder" else None
        )
    assert [text.rstrip("\n") for text in load_raw(data)["train"]["text"]] == texts


def test_masks_depend_on_the_row_the_seed_and_the_epoch_alone(wordpiece):
    rows = [{"input_ids": wordpiece(text).input_ids} for text in sentences(16, length=20)]
    collator = MaskingCollator(wordpiece, 0.3, seed=3)
    whole = collator(rows)
    for i, row in enumerate(rows):
        alone = collator([row])
        length = len(row["input_ids"])
        assert torch.equal(alone["input_ids"][0], whole["input_ids"][i, :length])
        assert torch.equal(alone["labels"][0], whole["labels"][i, :length])
    masked = whole["labels"] != -100
    assert 0.2 < masked.sum() / whole["attention_mask"].sum() < 0.4
    assert not masked[whole["attention_mask"] == 0].any()
    collator.epoch = 1
    assert not torch.equal(collator(rows)["labels"], whole["labels"])


def test_metrics_are_those_of_glue():
    generator = np.random.default_rng(0)
    references, predictions = generator.integers(0, 2, 50), generator.integers(0, 2, 50)
    accuracy = (references == predictions).mean()
    f1 = sklearn_metrics.f1_score(references, predictions)
    matthews = sklearn_metrics.matthews_corrcoef(references, predictions)
    names = {"cola": {"matthews_correlation": matthews}, "mrpc": {"accuracy": accuracy, "f1": f1}}
    names |= {"qqp": names["mrpc"]} | {key: {"accuracy": accuracy} for key in ["sst2", "mnli", "qnli", "rte", "wnli"]}
    for name, expected in names.items():
        assert GlueMetric(name).compute(predictions=predictions, references=references) == pytest.approx(expected)
    values = generator.random(50) * 5
    noisy = values + generator.normal(size=50)
    ranks = np.corrcoef(values.argsort().argsort(), noisy.argsort().argsort())[0, 1]
    found = GlueMetric("stsb").compute(predictions=noisy, references=values)
    assert found == pytest.approx({"pearson": np.corrcoef(values, noisy)[0, 1], "spearmanr": ranks}, abs=1e-6)
    assert set(GLUE_COLUMNS) < set(METRICS)
    with pytest.raises(ValueError, match="`config_name` must be one of"):
        GlueMetric("sst3")


def test_predictions_of_the_trainer_become_classes_or_values():
    logits = np.array([[0.1, 0.9], [2.0, 1.0]])
    loss = np.log1p(np.exp([-0.8, 1.0])).mean()
    expected = {"accuracy": 0.5, "loss": pytest.approx(loss), "examples": 2}
    assert by_trainer(TaskMetric("sst2"), logits, np.array([1, 1])) == expected
    values = np.array([[1.0], [2.0], [4.0]])
    found = by_trainer(TaskMetric("stsb"), values, np.array([1.0, 2.0, 4.5]))
    assert found["loss"] == pytest.approx(0.25 / 3) and found["spearmanr"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef(values[:, 0], [1.0, 2.0, 4.5])[0, 1])


@pytest.mark.parametrize("causal", [True, False])
def test_perplexity_of_the_trainer_counts_every_labelled_token_once(causal):
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(3, 5, 7)), generator.integers(0, 7, (3, 5))
    labels[0, 2:], labels[2] = -100, -100
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = [(i, s) for i in range(3) for s in range(causal, 5) if labels[i, s] != -100]
    losses = [-scores[i, s - causal, labels[i, s]] for i, s in places]
    found = by_trainer(Perplexity(causal), logits, labels)
    expected = {"perplexity": np.exp(np.mean(losses)), "loss": np.mean(losses), "tokens": len(places)}
    assert found == pytest.approx(expected, rel=1e-5)


def by_trainer(quality, logits, labels):
    """What a Trainer does, in batches of two rows."""
    settings, numbers = for_trainer(quality), []
    for start in range(0, len(labels), 2):
        batch = [torch.tensor(each[start : start + 2]) for each in (logits, labels)]
        numbers.append(settings["preprocess_logits_for_metrics"](*batch).numpy())
    return settings["compute_metrics"](EvalPrediction(np.concatenate(numbers), labels))


@pytest.mark.parametrize("name", GLUE_COLUMNS)
def test_each_task_reads_its_columns_and_labels(name, wordpiece):
    count = 12
    columns = {column: sentences(count, seed=i) for i, column in enumerate(GLUE_COLUMNS[name])}
    labels = [i % 3 / 2 * 5 for i in range(count)] if name == "stsb" else [i % 2 for i in range(count)]
    dataset = Dataset.from_dict({**columns, "label": labels, "idx": list(range(count))})
    if name != "stsb":
        classes = ["entailment", "neutral", "contradiction"] if name == "mnli" else ["no", "yes"]
        dataset = dataset.cast_column("label", ClassLabel(names=classes))
    names = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    data = DataArguments(task_name=name, max_eval_samples=5)
    splits = select_splits({"train": dataset, **dict.fromkeys(names, dataset)}, data, True, True)
    assert {split: len(each) for split, each in splits.items()} == {"train": count, **dict.fromkeys(names, 5)}
    task = find_task(splits, data)
    assert task.num_labels == {"stsb": 1, "mnli": 3}.get(name, 2)
    assert task.metric == name
    encoded = encode(splits["train"], wordpiece, task, data, 32, "train")
    expected = wordpiece(*[column[0] for column in columns.values()])
    assert encoded[0]["input_ids"] == expected.input_ids
    assert encoded["labels"][:] == labels


def test_own_data_may_have_named_classes_or_values(wordpiece):
    rows = {"review": sentences(4), "stars": ["good", "bad", "good", "ugly"], "score": [0.5, 1.0, 3.0, 9.0]}
    splits = {"train": Dataset.from_dict(rows)}
    classes = DataArguments(text_columns=["review"], label_column="stars")
    task = find_task(splits, classes)
    assert task.labels == ["bad", "good", "ugly"]
    assert encode(splits["train"], wordpiece, task, classes, 32, "train")["labels"][:] == [1, 0, 1, 2]
    values = DataArguments(text_columns=["review"], label_column="score")
    task = find_task(splits, values)
    assert (task.labels, task.problem_type, task.metric) == (None, "regression", "regression")
    with pytest.raises(ValueError, match=r"must hold finite numbers from 0.0 to 5.0, got 9.0 in row 3"):
        find_task(splits, DataArguments(task_name="stsb", text_columns=["review"], label_column="score"))
    with pytest.raises(ValueError, match="must hold one of bad, good, got 'ugly' in row 3"):
        find_task(splits, classes, labels=["bad", "good"])


@pytest.fixture(scope="module")
def pieces(folder):
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(sentences(400)))

    def train(kind: str):
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(folder / kind),
            vocab_size=45,
            model_type=kind,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            user_defined_symbols=["[CLS]", "[SEP]", "[MASK]"],
            minloglevel=2,
        )
        return folder / f"{kind}.model"

    return train


@pytest.mark.parametrize("kind, causal", [("unigram", True), ("bpe", True), ("unigram", False)])
def test_sentencepiece_tokens_are_exact_and_survive_saving(kind, causal, pieces, tmp_path):
    model = pieces(kind)
    original = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = sentencepiece_tokenizer(model, causal)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in sentences(20, seed=5):
            ids = each(text).input_ids
            inner = ids[1:-1] if not causal else ids
            assert inner == original.encode(text)
        if not causal:
            assert [each.cls_token_id, each.sep_token_id] == [ids[0], ids[-1]]
            assert each.mask_token_id is not None


def test_a_sentencepiece_model_that_cannot_be_reproduced_is_refused(pieces):
    with pytest.raises(
        ValueError, match="must be a SentencePiece model of type unigram for a model that is not causal"
    ):
        sentencepiece_tokenizer(pieces("bpe"), causal=False)


def test_the_metrics_load_as_a_local_module_of_evaluate(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path), raising=False)
    loaded = evaluate.load(metrics.__file__, "sst2")
    assert loaded.compute(predictions=[0, 1], references=[1, 1]) == {"accuracy": 0.5}
