"""Commands with an argument, and those that show something: settings, drafting, files, theme.

A part of the chat screen.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from textual.screen import Screen

from dflash_chat import attach, export
from dflash_chat.errors import DiskError, UsageError
from dflash_chat.runtime.api import SamplingParams
from dflash_chat.settings import draft_choice, draft_choice_words, sampling_option, suggest
from dflash_chat.ui.bars import grouped
from dflash_chat.ui.completion import themes
from dflash_chat.ui.dialogue import Dialogue
from dflash_chat.ui.effects import effect
from dflash_chat.ui.prompt import Prompt
from dflash_chat.ui.transcript import Card

_MOST_DRAFTED = 63  # while nothing is loaded that would say less


class SettingActions(Screen[None]):
    """What /set and its like do. Each raises UserError for what cannot be."""

    dialogue: Dialogue

    def action_system(self, argument: str = "") -> None:
        """Set the system prompt."""
        chat, cached = self.dialogue.chat, self.dialogue.meter.context_tokens
        reread = chat.system != argument and chat.turns
        chat.system = argument
        self.dialogue.record.changed()
        words = [argument or "none"]
        if reread:
            lost = f"; {grouped(cached)} cached tokens no longer fit" if cached else ""
            words.append(f"The chat is read anew from its beginning{lost}.")
        self._say("System prompt", "\n".join(words))

    def action_set_option(self, argument: str = "") -> None:
        """Change a sampling parameter; alone: say them all."""
        dialogue = self.dialogue
        if not argument:
            self._say("Settings", _settings_words(dialogue.params))
            return
        before, dialogue.params = dialogue.params, sampling_option(argument, dialogue.params)
        words = [f"{argument}, from the next answer on"]
        if dialogue.draft and dialogue.info and dialogue.info.drafter:
            words.append(effect(before, dialogue.params, dialogue.measured))
        self._say("Setting", "\n".join(filter(None, words)))

    def action_draft(self, argument: str = "") -> None:
        """Drafting on, off, by what pays, or a fixed number of tokens."""
        info = self.dialogue.info
        most = info.block_size - 1 if info and info.block_size > 1 else _MOST_DRAFTED
        pinned = self.dialogue.load.options.draft_tokens
        draft, tokens = draft_choice(argument, most, pinned)
        self.dialogue.draft, self.dialogue.draft_tokens = draft, tokens
        self._say("Drafting", f"{draft_choice_words(draft, tokens)}, from the next answer on")

    def action_stats(self) -> None:
        """Say the figures of the last answer."""
        finished, info = self.dialogue.last_finished, self.dialogue.info
        if finished is None or info is None:
            raise UsageError("There is no answer yet.")
        from dflash_chat.once import in_words

        self._say("The last answer", in_words(finished, info.load_s))

    def action_file(self, argument: str = "") -> None:
        """Name a file in the prompt; it is read when the message is sent."""
        file = attach.read(argument)
        prompt = self.query_one(Prompt)
        space = " " if prompt.text and not prompt.text[-1].isspace() else ""
        prompt.put_in(space + attach.quoted(argument) + " ")
        self.notify(str(file), markup=False)

    def action_export(self, argument: str = "") -> None:
        """Write the chat into a new file: with all branches and steps as .json, else Markdown."""
        path = Path(argument).expanduser()
        record = self.dialogue.record
        if path.suffix.lower() == ".json":
            text = json.dumps(export.to_json(record.chat, record.trace), ensure_ascii=False) + "\n"
        else:
            text = export.to_markdown(record.chat)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise UsageError(f"{argument} is there already.", "Choose another name.") from error
        except OSError as error:
            raise DiskError(f"{argument} cannot be written: {error.strerror}.") from error
        self._say("Exported", str(path))

    def action_theme(self, argument: str = "") -> None:
        """Change the colours."""
        name = argument.lower()
        if name not in themes():
            raise UsageError(f"There is no theme {argument!r}.", suggest(name, themes()))
        self.app.theme = name

    def _say(self, title: str, body: str) -> None:
        self.dialogue.show(Card(title, body))


def _settings_words(params: SamplingParams) -> str:
    """Each setting in a line."""
    values = asdict(params) | {"stop": ", ".join(map(repr, params.stop)) or "none"}
    if params.seed is None:
        values["seed"] = "another for every answer"
    width = max(map(len, values))
    return "\n".join(f"{name:{width}}  {value}" for name, value in values.items())
