"""The flags of `generate` and `chat`; nothing heavy is imported."""

from dataclasses import dataclass, field
from typing import Literal

from ...data.ranges import check_ranges
from ...training.arguments import ModelArguments

SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # without effect where nothing is drawn


@dataclass
class TalkArguments:
    """What both verbs take: how text is drawn, which model, where it runs."""

    max_new_tokens: int = field(default=256, metadata={"help": "Tokens of a completion, at most."})
    do_sample: bool | None = field(
        default=None,
        metadata={"help": "Draw the next token, or take the likeliest; without it, as the other flags say, else as "
                          "the model's generation_config.json does."},
    )  # fmt: skip
    temperature: float | None = field(
        default=None, metadata={"help": "Below 1 draws likely tokens more often; 0 takes the likeliest."}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "Draw from the likeliest tokens that together have this probability."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Draw from the so many likeliest tokens; 0 from all."})
    min_p: float | None = field(
        default=None, metadata={"help": "Draw from tokens at least this share as likely as the likeliest."}
    )
    repetition_penalty: float | None = field(
        default=None, metadata={"help": "Above 1 makes tokens that were there before less likely."}
    )
    stop: list[str] | None = field(
        default=None,
        metadata={"help": r"Texts that end a completion, which goes without them; \n is a line break.",
                  "metavar": "TEXT"},
    )  # fmt: skip
    seed: int = field(default=0, metadata={"help": "Of what is drawn."})
    use_mtp: bool = field(
        default=False,
        metadata={"help": "Guess tokens by the model's prediction layers or draft stages (V3 and on) and check "
                          "several in one step: the same text, one at a time."},
    )  # fmt: skip
    system: str | None = field(default=None, metadata={"help": "A system message before the conversation."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "The chat format, for a model without one or in place of its own: coder, v2, v3, r1, v3.1, "
                          "..., or a .jinja file."},
    )  # fmt: skip
    thinking: bool | None = field(
        default=None, metadata={"help": "Reason before answering, or don't; for chat formats that know the switch."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = field(
        default=None,
        metadata={"help": "Type of the weights; without it the checkpoint's on an accelerator, float32 on a CPU."},
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, mps, ...; without it the accelerator, if there is one."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with a Hub model."})

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.do_sample is False and (idle := [name for name in SAMPLING if getattr(self, name)]):
            raise ValueError(f"--{idle[0]} has no effect with --do_sample false; leave one of them out.")
        self.stop = [text.replace("\\n", "\n").replace("\\t", "\t") for text in self.stop or []]
        if "" in self.stop:
            raise ValueError("--stop '': an empty text is everywhere; write one that ends a completion.")

    def model(self, name: str, dtype: str) -> ModelArguments:
        """How to open the model."""
        return ModelArguments(
            model_name_or_path=name,
            model_revision=self.model_revision,
            dtype=self.dtype or dtype,  # type: ignore[arg-type]
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass
class GenerateArguments(TalkArguments):
    """What to continue, and where the completions go."""

    prompts: list[str] = field(default_factory=list, init=False)
    input: str | None = field(
        default=None,
        metadata={"help": "Prompts: .jsonl, .json, .csv, .tsv or .parquet with a column `prompt`, or `messages` (and "
                          "`tools`); any other file has one in each line. Without it standard input has."},
    )  # fmt: skip
    column: str | None = field(
        default=None,
        metadata={"help": "The column of a table, of texts or conversations; else `prompt` or `messages`."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "JSON lines, one for each prompt in the order of the input; a file that the same command "
                          "left half-written is gone on with. Without it, standard output."},
    )  # fmt: skip
    overwrite: bool = field(default=False, metadata={"help": "Begin --output anew, whatever it holds."})
    raw: bool = field(
        default=False, metadata={"help": "Continue the text as it stands, though there is a chat format."}
    )
    chat: bool = field(
        default=False, metadata={"help": "Each prompt is what a user says; refuse without a chat format."}
    )
    num_return_sequences: int = field(default=1, metadata={"help": "Completions of each prompt."})
    num_beams: int = field(default=1, metadata={"help": "Width of beam search, which draws nothing."})
    batch_size: int = field(default=32, metadata={"help": "Completions that are written at once."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.raw and self.chat:
            raise ValueError("--raw and --chat say the opposite; keep one of them.")
        if self.raw and (idle := [n for n in ("system", "chat_template", "thinking") if getattr(self, n) is not None]):
            raise ValueError(f"--{idle[0]} has no effect with --raw; leave one of them out.")
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        if self.use_mtp:
            raise ValueError("--use_mtp guesses how one text goes on, --num_beams writes several; keep one of them.")
        drawn = [name for name in SAMPLING if getattr(self, name)]
        if self.do_sample or drawn:
            raise ValueError(f"--{drawn[0] if drawn else 'do_sample'} draws, --num_beams doesn't; keep one of them.")
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"--num_return_sequences {self.num_return_sequences}: {self.num_beams} beams have no more than "
                f"{self.num_beams} completions; raise --num_beams."
            )


@dataclass
class ChatArguments(TalkArguments):
    """A conversation in the terminal."""

    max_new_tokens: int = field(default=2048, metadata={"help": "Tokens of an answer, reasoning included, at most."})
    show_reasoning: bool | None = field(
        default=None, metadata={"help": "Show the reasoning before an answer; without it, in a terminal only."}
    )
