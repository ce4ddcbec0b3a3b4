"""Speech to text: Whisper and its kin write the text token by token; CTC models (wav2vec 2.0) name a letter a frame.

WER, CER: words and letters to change, add or take away, as a share of those spoken; after `normalised`.
"""

from __future__ import annotations

import json
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peft_fast.errors import SettingsError, UnsupportedError, fail
from peft_fast.recipes.tasks import Column, Problem, classes, loading, media, text

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = ("sentence", "transcript", "transcription", "normalized_text", "raw_text", "target", "words")
PAD, UNKNOWN, SPACE = "<pad>", "<unk>", "|"
SHOWN = 20
WRITING = ("label_smoothing", "beams", "source_language", "max_target_length", "max_new_tokens")
QUIET = 0.2  # share of a window, at its end, where a long recording may be cut


def normalised(words: str) -> str:
    """What WER compares: NFKC, lower case, letters, digits and apostrophes alone, single spaces."""
    words = unicodedata.normalize("NFKC", words).lower().replace("’", "'")
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in words)
    return " ".join(kept.split())


class Task(media.MediaTask):
    columns = (Column("audio", "audio", media.SOUNDS), Column("text", "text", TEXTS, truth=True))
    modality = "audio"
    unit = "seconds"
    metric = "wer"
    judged_by = {"loss": False, "wer": False, "cer": False, "wer_as_written": False}
    auto = "AutoModelForSpeechSeq2Seq"

    # ---- rows

    def learn(self, splits: dict[str, Dataset]) -> None:
        """The letters of the transcripts: what a CTC model without a vocabulary learns to write."""
        letters = {letter for words in splits["train"]["text"] for letter in normalised(str(words))} - {" "}
        self.facts["letters"] = sorted(letters)

    def check(self, splits: dict[str, Dataset]) -> Iterator[Problem]:
        """A transcript has words, few enough for the model, and a CTC model frames enough for its letters."""
        for split, rows in splits.items():
            for place, words in enumerate(rows["text"]):
                words = str(words or "")
                if not normalised(words):
                    what, fix = f"{words!r} has no word", "Give what is said, or leave the row out"
                    yield media.problem(splits, split, place, "text", what, fix)
                    continue
                ids = self._ids(words)
                if not self.ctc and len(ids) > self.config.max_target_length:
                    what = f"{len(ids)} tokens; {self.config.max_target_length} are used"
                    fix = "Raise max_target_length, or cut the recording"
                    yield media.problem(splits, split, place, "text", what, fix, stops=False)
                if self.ctc:
                    heard = min(media.duration(rows[place]["audio"]), self.config.max_seconds)
                    # between two equal letters there has to be a frame without one
                    need = len(ids) + sum(a == b for a, b in zip(ids, ids[1:], strict=False))
                    if 0 < heard and self._frames(heard) < need:
                        what = f"{len(ids)} letters in {heard:.2f} seconds, which are {self._frames(heard)} frames"
                        fix = "Check that the text belongs to the recording"
                        yield media.problem(splits, split, place, "text", what, fix)

    def too_long(self, rows: Dataset) -> tuple[Sequence[float], float]:
        return media.seconds(rows), self.config.max_seconds

    def truncates(self, split: str, role: str | None) -> str:
        """Only predict() hears all of it, piece by piece."""
        return "are cut, and their transcripts are not" + "; WER counts what is not heard" * (split != "train")

    # ---- model

    @property
    def ctc(self) -> bool:
        """Whether the model is one of letters in frames."""
        return self.auto == "AutoModelForCTC"

    def load_processor(self) -> None:
        import transformers

        self.known = loading.load_config(self.config)
        if type(self.known) in transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
            self.auto = "AutoModelForSpeechSeq2Seq"
            self.processor = loading.load_processor(self.config, "AutoProcessor")
            self._set_up_writing()
        elif type(self.known) in transformers.MODEL_FOR_CTC_MAPPING:
            self.auto = "AutoModelForCTC"
            self.processor = self._letters(loading.load_processor(self.config, "AutoFeatureExtractor"))
            self._refuse("a CTC model, which generates no tokens", *WRITING)
        else:
            given = f"model: {self.config.model}, a {type(self.known).__name__}"
            fail(UnsupportedError, given, "a model of speech: Whisper, wav2vec 2.0 or their kin", "take another model")
        self.rate = media.rate_of(self.processor, self.config)

    def _refuse(self, what: str, *names: str) -> None:
        """Options that would do nothing."""
        fields = type(self.config).model_fields
        if chosen := [name for name in names if getattr(self.config, name) != fields[name].default]:
            given = f"{', '.join(f'{name}: {getattr(self.config, name)}' for name in chosen)}, and {what}"
            fail(SettingsError, given, "options that this model has a use for", f"leave {' and '.join(chosen)} out")

    def _set_up_writing(self) -> None:
        """Prefix of the decoder: language and task of a multilingual Whisper."""
        found, tokenizer = self.processor.feature_extractor, self.processor.tokenizer
        most = getattr(found, "chunk_length", None)
        if most and self.config.max_seconds > most:
            given = f"max_seconds: {self.config.max_seconds:g}; {self.config.model} hears {most} seconds at once"
            fail(SettingsError, given, f"{most} at most", "lower max_seconds; predict cuts longer recordings itself")
        positions = getattr(self.known, "max_target_positions", None)
        if positions and max(self.config.max_target_length, self.config.max_new_tokens + 4) > positions:
            given = f"max_target_length: {self.config.max_target_length}, max_new_tokens: {self.config.max_new_tokens}"
            fail(SettingsError, given, f"what fits into the decoder's {positions} positions", "lower them")
        self.speaks: dict[str, Any] = {}
        if self.known.model_type != "whisper":
            self._refuse("a model other than Whisper", "source_language")
            return
        multilingual = "<|translate|>" in tokenizer.get_vocab() and self.known.vocab_size != 51864
        language = self.config.source_language
        if multilingual and not language:
            given = f"model: {self.config.model}, which is multilingual, and no source_language"
            fail(SettingsError, given, "the language that is spoken", "give source_language: en, de, fr, …")
        if not multilingual and language not in (None, "en", "english"):
            given = f"source_language: {language}; {self.config.model} knows English alone"
            fail(SettingsError, given, "a multilingual model", "leave it out, or take a model without .en")
        if multilingual:
            self.speaks = {"language": language, "task": "transcribe"}
            try:
                tokenizer.set_prefix_tokens(**self.speaks, predict_timestamps=False)
                tokenizer.prefix_tokens  # noqa: B018 (an unknown language is only noticed here)
            except ValueError as error:
                given = f"source_language: {language}: {str(error)[:200]}"
                fail(SettingsError, given, "a language of Whisper", "give its code, such as en", error)

    def _letters(self, extractor: Any) -> Any:
        """A processor with the model's own vocabulary if that has every letter, else with one of the transcripts."""
        from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2Processor

        letters = self.facts["letters"]
        if "case" not in self.facts:
            self.facts["case"] = None
            try:
                own = loading.load_processor(self.config, "AutoTokenizer").get_vocab()
            except UnsupportedError:
                own = {}
            for case in ("lower", "upper"):
                if own and all(getattr(letter, case)() in own for letter in letters):
                    self.facts["case"] = case
                    break
        if self.facts["case"]:
            return Wav2Vec2Processor(extractor, loading.load_processor(self.config, "AutoTokenizer"))
        vocabulary = {token: place for place, token in enumerate((PAD, UNKNOWN, SPACE, *letters))}
        with tempfile.TemporaryDirectory(prefix="peft_fast-") as folder:
            path = Path(folder) / "vocab.json"
            path.write_text(json.dumps(vocabulary), encoding="utf-8")
            tokens = {"pad_token": PAD, "unk_token": UNKNOWN, "word_delimiter_token": SPACE}
            tokenizer = Wav2Vec2CTCTokenizer(str(path), bos_token=None, eos_token=None, **tokens)
        return Wav2Vec2Processor(extractor, tokenizer)

    def load_model(self, dtype: torch.dtype) -> Any:
        if not self.ctc:
            model = self.load(dtype, use_cache=False)
            model.config.forced_decoder_ids = None
            model.generation_config.forced_decoder_ids = None
            for name, value in self.speaks.items():
                setattr(model.generation_config, name, value)
            return model
        tokenizer = self.processor.tokenizer
        fields = {"pad_token_id": tokenizer.pad_token_id, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
        return self.load(dtype, **fields, vocab_size=len(tokenizer))

    def head(self, model: Any) -> list[str]:
        return super().head(model) if self.ctc else []

    # ---- features

    def _ids(self, words: str) -> list[int]:
        if self.ctc:
            return self.processor.tokenizer(getattr(normalised(words), self.facts["case"] or "lower")())["input_ids"]
        return self.processor.tokenizer(words)["input_ids"]

    def _frames(self, heard: float) -> int:
        length = int(max(heard, media.LEAST_SECONDS) * self.rate)
        sizes = getattr(self.known, "conv_kernel", ()), getattr(self.known, "conv_stride", ())
        for kernel, stride in zip(*sizes, strict=True):
            length = (length - kernel) // stride + 1
        return length

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Files stay files: a recording is read when its batch is made."""
        features = self.place(rows.select_columns(["audio"]))
        if "text" not in rows.column_names:
            return features
        return features.add_column("labels", [self._target(str(words)) for words in rows["text"]])

    def _target(self, words: str) -> list[int]:
        ids = self._ids(words)
        if self.ctc:
            return ids
        start, end = self.known.decoder_start_token_id, self.known.eos_token_id
        # the model puts the start before its labels itself
        ids = ids[1:] if ids and ids[0] == start else ids
        most = self.config.max_target_length
        return ids if len(ids) <= most else [*ids[: most - 1], end]

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.feed(self.hear(media.recordings(features, self.rate, self.config.max_seconds)))
        if "labels" in features[0]:
            rows = [torch.tensor(feature["labels"]) for feature in features]
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        return batch

    def hear(self, sounds: list[np.ndarray]) -> dict[str, Any]:
        """Features of recordings."""
        return media.features_of(self.processor, sounds)

    def length(self, feature: dict[str, Any]) -> int:
        return max(1, round(media.duration(feature["audio"])))

    def count(self, batch: dict[str, Any]) -> int:
        return round(media.heard(batch, self.processor))

    # ---- learning and judging

    def loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor | None:
        if self.ctc:
            return None
        return classes.loss(outputs["logits"], batch["labels"], None, classes.smoothing(self.config))

    def write(self, model: Any, batch: dict[str, Any]) -> list[str]:
        """What the model hears in each recording of a batch."""
        asked = {name: value for name, value in self.inputs(batch).items() if name != "labels"}
        if self.ctc:
            return self.processor.batch_decode(model(**asked)["logits"].argmax(-1))
        with loading.quiet():
            ids = model.generate(**asked, max_new_tokens=self.config.max_new_tokens, num_beams=self.config.beams,
                                 use_cache=True, **self.speaks)  # fmt: skip
        return [words.strip() for words in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def evaluation_loop(self, trainer: Any, loader: Any, prefix: str) -> Any:
        """Loss over what was said, and the model's own text of each recording."""
        from transformers.trainer_utils import EvalLoopOutput

        model, total, seen, answers = trainer.model, 0.0, 0, []
        with media.judging(trainer) as device:
            for batch in loader:
                batch = media.to_device(dict(batch), device)
                output, count = model(**self.inputs(batch)), int((batch["labels"] != -100).sum())
                loss = self.loss(output, batch)
                total, seen = total + float(output["loss"] if loss is None else loss) * count, seen + count
                answers += self.write(model, batch)
        truth = [self.said(ids) for ids in loader.dataset["labels"]]
        found = {"loss": total / max(1, seen)} | errors(truth, answers)
        metrics = {f"{prefix}_{name}": value for name, value in found.items()}
        return EvalLoopOutput(answers, truth, metrics, len(answers))

    def said(self, ids: list[int]) -> str:
        """The transcript of labels."""
        if self.ctc:
            return self.processor.tokenizer.decode(ids, group_tokens=False)
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        lines = []
        for place, (truth, answer) in enumerate(zip(output.label_ids, output.predictions, strict=True)):
            row = features[place]["row"]
            name = media.name_of(rows[row]["audio"], row)
            lines.append([name, text.shown(truth), text.shown(answer), round(errors([truth], [answer])["wer"], 4)])
        lines.sort(key=lambda line: -line[-1])
        head = ["recording", "said", "heard", "WER"]
        found = [{"kind": "table", "title": "Most wrong", "head": head, "rows": lines[:SHOWN]}]
        right = sum(line[-1] == 0 for line in lines)
        count = {"kind": "table", "title": "Recordings", "head": ["without a mistake", "all"]}
        return [*found, {**count, "rows": [[right, len(lines)]]}]

    # ---- use

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        """A recording longer than max_seconds is cut where it is quiet, and its pieces' texts are joined."""
        from peft_fast.recipes.data import load_audio

        self.see(model)
        pieces: list[tuple[int, np.ndarray]] = []
        for place, value in enumerate(rows["audio"]):
            sound = load_audio(value, self.rate, None)
            pieces += [(place, piece) for piece in divided(sound, self.rate, self.config.max_seconds)]
        answers: list[list[str]] = [[] for _ in range(len(rows))]
        size = self.config.eval_batch_size or 2 * self.config.batch_size
        device = next(model.parameters()).device
        with text.evaluating(model), torch.no_grad():
            for start in range(0, len(pieces), size):
                part = pieces[start : start + size]
                batch = media.to_device(self.feed(self.hear([piece for _, piece in part])), device)
                for (place, _), words in zip(part, self.write(model, batch), strict=True):
                    answers[place].append(words)
        return [{"text": " ".join(filter(None, words))} for words in answers]


def errors(truth: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """WER and CER of normalised texts, and WER of the texts as they are written."""
    import jiwer

    plain = [(normalised(said), normalised(heard)) for said, heard in zip(truth, answers, strict=True)]
    plain = [(said, heard) for said, heard in plain if said]
    if not plain:
        return {"wer": 0.0, "cer": 0.0, "wer_as_written": 0.0}
    said, heard = (list(part) for part in zip(*plain, strict=True))
    written = [(re.sub(r"\s+", " ", a).strip(), b.strip()) for a, b in zip(truth, answers, strict=True) if a.strip()]
    return {
        "wer": float(jiwer.wer(said, heard)),
        "cer": float(jiwer.cer(said, heard)),
        "wer_as_written": float(jiwer.wer(*(list(part) for part in zip(*written, strict=True)))),
    }


def divided(sound: np.ndarray, rate: int, most: float) -> list[np.ndarray]:
    """Pieces of at most ``most`` seconds, each ended where the last fifth of its window is quietest."""
    window, step, pieces = int(most * rate), max(1, rate // 50), []
    while len(sound) > window:
        tail = sound[int(window * (1 - QUIET)) : window]
        energy = [float(np.square(tail[i : i + step]).sum()) for i in range(0, max(1, len(tail) - step), step)]
        cut = int(window * (1 - QUIET)) + int(np.argmin(energy)) * step + step // 2
        pieces.append(sound[:cut])
        sound = sound[cut:]
    least = int(media.LEAST_SECONDS * rate)
    return [np.pad(piece, (0, max(0, least - len(piece)))) for piece in [*pieces, sound]]
