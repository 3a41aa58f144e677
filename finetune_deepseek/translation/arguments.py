"""What translation is told: pairs, languages and prompt of a run; how a trained model is asked."""

from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Literal, TypeAlias

from ..data.arguments import DataArguments
from ..data.ranges import check_ranges
from ..training.arguments import ModelArguments
from .augmentation import AugmentationArguments
from .moses import moses_lower

LanguagePair: TypeAlias = tuple[str, str]  # source and target language


@dataclass
class TranslationArguments(AugmentationArguments, DataArguments):
    """Which pairs, in which languages, in which prompt."""

    SAVED = (
        *("source_lang", "target_lang", "both_directions", "preprocess"),
        *("prompt_template", "stop_text", "max_source_length", "max_target_length"),
    )
    FIRST = (*DataArguments.FIRST, "source_lang", "target_lang", "prompt_template")
    RECIPE = Path(__file__).with_name("recipe.yaml")
    EXAMPLES = """examples:
  deepseek-hf finetune translation --output_dir runs/quickstart
      both stages of the built-in recipe: English-Chinese from scratch, then a German LoRA adapter
  deepseek-hf finetune translation --preset tiny_v3 --data_dir data/multi30k_en_de --target_lang de \\
      --output_dir runs/de
      a small model from scratch on your files
  deepseek-hf finetune translation --preset tiny_v3 --data_dir data/multi30k_en_de data/tatoeba_en_zh \\
      --target_lang de zh --output_dir runs/de-zh
      one model for two languages, scored by pair
  deepseek-hf finetune translation --model_name_or_path deepseek-ai/DeepSeek-V2-Lite --use_peft \\
      --lora_target attention shared --dataset_name wmt16 --dataset_config_name de-en \\
      --source_lang en --target_lang de --output_dir runs/lora
      LoRA on a pretrained model and a data set of the Hub"""

    source_lang: str = field(default="en", metadata={"help": "Key of the source text in the data."})
    target_lang: list[str] = field(
        default_factory=lambda: ["zh"],
        metadata={"help": "Key of the target text in the data; several for one model of several.", "metavar": "LANG"},
    )
    both_directions: bool = field(
        default=False, metadata={"help": "Translate from each --target_lang to --source_lang too, in the same model."}
    )
    preprocess: Literal["none", "moses_lower"] = field(
        default="none",
        metadata={
            "help": "moses_lower: lower-case, normalise and tokenise all texts, as Multi30k's lc.norm.tok files."
        },
    )
    tokenized_bleu: bool = field(
        default=False,
        metadata={"help": "Score BLEU on lower-cased, normalised and tokenised text too, as published for Multi30k."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the training rows as they are used."})
    max_source_length: int = field(
        default=128,
        metadata={"help": "Tokens of a prompt. Longer rows are left out of training and cut at evaluation."},
    )
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a translation, its end included."})
    prompt_template: str = field(
        default="{target_lang}: {source}\n",
        metadata={"help": r"What the model continues; {source_lang} is known too, and \n is a new line."},
    )
    stop_text: str | None = field(
        default=None,
        metadata={"help": r"A translation ends before this, such as \n, if the model goes on (few-shot)."},
    )
    tokenizer_langs: list[str] | None = field(
        default=None,
        metadata={"help": "Further languages of the data for a tokenizer to be trained.", "metavar": "LANG"},
    )
    nearest_pair_baseline: bool = field(
        default=True, metadata={"help": "Score the nearest training pair's target beside the model (--do_predict)."}
    )

    def __post_init__(self) -> None:
        DataArguments.__post_init__(self)
        AugmentationArguments.__post_init__(self)
        # YAML and habit also write "de" or "de,zh".
        words = [self.target_lang] if isinstance(self.target_lang, str) else self.target_lang
        self.target_lang = [word for words in words for word in words.split(",") if word]
        if self.source_lang in self.target_lang:
            raise ValueError(f"--source_lang and --target_lang are both {self.source_lang!r}; change one.")
        if len(set(self.target_lang)) < len(self.target_lang) or not self.target_lang:
            raise ValueError(f"--target_lang {' '.join(self.target_lang)}: name each language once, at least one.")
        if self.preprocess != "none" or self.tokenized_bleu:
            for language in self.languages if self.preprocess != "none" else {target for _, target in self.pairs}:
                moses_lower(language)  # refuses what it isn't for
        self._check_prompt()

    def _check_prompt(self) -> None:
        self.prompt_template = self.prompt_template.replace("\\n", "\n")
        self.stop_text = self.stop_text.replace("\\n", "\n") if self.stop_text else None
        where = f"--prompt_template {self.prompt_template!r}"
        try:
            parts = [part[1:] for part in Formatter().parse(self.prompt_template) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"{where}: {error}; write {{{{ for a brace.") from error
        fields = {name for name, _, _ in parts}
        if shaped := [name for name, specification, conversion in parts if specification or conversion]:
            raise ValueError(f"{where}: {{{shaped[0]}}} stands alone in its braces, without a format or conversion.")
        unknown = fields - {"source", "source_lang", "target_lang"}
        if unknown or "source" not in fields:
            raise ValueError(
                f"{where}: it needs {{source}}, and may have {{source_lang}} and {{target_lang}}, but no other name "
                "in braces."
            )
        if len(self.pairs) > 1 and "target_lang" not in fields:
            raise ValueError(
                f"{where}: with several directions it needs {{target_lang}}, which says where to translate to."
            )

    @property
    def is_embedded(self) -> bool:
        return not self.names_data

    @property
    def languages(self) -> list[str]:
        return [self.source_lang, *self.target_lang]

    @property
    def pairs(self) -> list[LanguagePair]:
        """What the model translates from and to."""
        forth = [(self.source_lang, target) for target in self.target_lang]
        return forth + [(target, source) for source, target in forth] * self.both_directions


@dataclass
class TranslateArguments:
    """What to translate, and how to search."""

    input: str | None = field(
        default=None, metadata={"help": "UTF-8 file with one text per line; without it, standard input."}
    )
    output: str | None = field(default=None, metadata={"help": "File for as many lines; without it, standard output."})
    source_lang: str | None = field(
        default=None, metadata={"help": "Language to translate from; without it, that of training."}
    )
    target_lang: str | None = field(default=None, metadata={"help": "The same, to translate to."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "As in training; needed only for a model that was not trained here."}
    )
    num_beams: int = field(default=1, metadata={"help": "Width of beam search; 1 is greedy search."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "With beams: below 1 prefers shorter translations, above 1 longer ones."}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "Tokens of a translation; without it, as in training."}
    )
    batch_size: int = field(default=32, metadata={"help": "Texts that are translated at once."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type of the weights; auto takes the checkpoint's."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with a Hub model."})

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.length_penalty != 1 and self.num_beams == 1:
            raise ValueError("--length_penalty has no effect without beams; add --num_beams 5, say.")

    def model(self, name: str) -> ModelArguments:
        return ModelArguments(
            model_name_or_path=name,
            model_revision=self.model_revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
