"""Everything a person can do, in one table: keys, slash commands, palette, footer and help come
from it.

Pure data. `Action.call` names a method `action_…` of the chat screen, for scope "prompt" of the
prompt, for scope "app" of the app; a command calls the same method with its argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Keymap = Mapping[str, str]  # action id → keys, as in the `[keys]` of config.toml

APP, CHAT, PROMPT, TURN = "app", "chat", "prompt", "turn"  # where a key works


@dataclass(frozen=True)
class Action:
    """`id` is its name in `[keys]`, `name` in footer and palette. `keys` are separated by commas;
    `argument` shows what may follow `command`, in brackets if it may be left out."""

    id: str
    name: str
    does: str
    keys: str = ""
    call: str = ""
    command: str = ""
    argument: str = ""
    scope: str = CHAT
    footer: bool = False

    @property
    def method(self) -> str:
        """The method without its arguments."""
        return (self.call or self.id).partition("(")[0]

    @property
    def needs_argument(self) -> bool:
        """Whether the command alone says nothing."""
        return bool(self.argument) and not self.argument.startswith("[")

    @property
    def usage(self) -> str:
        """The command and what may follow it."""
        return f"{self.command} {self.argument}".strip()


ACTIONS = (
    # in the prompt
    Action("send", "Send", "send the message", "enter", scope=PROMPT, footer=True),
    Action("newline", "Newline", "break the line", "ctrl+j,shift+enter", scope=PROMPT, footer=True),
    Action("editor", "Editor", "write the message in $VISUAL or $EDITOR", "ctrl+g"),
    # answers
    Action("stop", "Stop", "stop the answer; what came stays", "escape", footer=True),
    Action(
        "again", "Again", "answer the last question again", "ctrl+r",
        command="/regen", footer=True,
    ),
    Action(
        "continue", "Continue", "go on with an answer that was stopped or cut",
        call="continue_answer", command="/continue",
    ),
    Action("thoughts", "Thoughts", "show or hide what the model thinks", "ctrl+t",
           command="/think"),
    Action(
        "undo", "Undo", "take the last question back into the prompt", call="undo_turn",
        command="/undo",
    ),
    # at the turn under the cursor
    Action("turn_up", "Turn up", "put the cursor on the turn above", "alt+up", "turn(-1)"),
    Action("turn_down", "Turn down", "put the cursor on the turn below", "alt+down", "turn(1)"),
    Action("copy_turn", "copy", "copy it as it was written", "y", scope=TURN, footer=True),
    Action(
        "code", "code", "continue it if it was stopped, else copy its next code block", "c",
        scope=TURN, footer=True,
    ),
    Action("edit", "edit", "edit its question; the answer becomes a branch", "e", scope=TURN,
           footer=True),
    Action("regenerate", "answer again", "answer it again, on a branch", "r", scope=TURN,
           footer=True),
    Action("xray_turn", "x-ray", "its answer by block and origin", "x", "xray", scope=TURN,
           footer=True),
    Action("delete", "delete", "delete it with all below it, pressed twice", "d", "delete_turn",
           scope=TURN, footer=True),
    # looking
    Action("help", "Help", "keys, commands and numbers", "f1", command="/help", footer=True),
    Action("quit", "Quit", "leave", "ctrl+q", command="/quit", scope=APP, footer=True),
    Action("palette", "Commands", "all of these by name, and saved chats by what they say",
           "ctrl+p", "command_palette", scope=APP, footer=True),
    Action("new", "New chat", "start a new chat", "ctrl+n", "new_chat", "/clear", footer=True),
    Action("sessions", "Chats", "open, search, rename, export or delete a saved chat", "ctrl+o",
           command="/resume", argument="[ID]", footer=True),
    Action("branch", "Other branch", "go to the next branch of a turn that has several",
           "alt+right", "branch(1)", "/branch"),
    Action("branch_before", "Branch before", "go to the branch before", "alt+left", "branch(-1)"),
    Action("panel", "Panel", "show or hide the numbers", "f2", "toggle_panel", footer=True),
    Action("xray", "X-ray", "the answer by block and origin", "f3", command="/xray", footer=True),
    Action("plan", "Plan", "what the pair takes, why, and what would change it", "f4",
           command="/plan", footer=True),
    Action("models", "Models", "all pairs: what fits; fetch, load, remove", "f8",
           command="/models", footer=True),
    Action("compare", "A/B", "the last question with and without drafting", "f9",
           command="/ab", footer=True),
    Action("copy", "Copy", "copy the selection, else stop", "ctrl+c", "copy_or_stop"),
    Action("page_up", "Page up", "scroll up by a page", "pageup", "page(-1)"),
    Action("page_down", "Page down", "scroll down by a page", "pagedown", "page(1)"),
    Action("line_up", "Line up", "scroll up by a line", "ctrl+up", "line(-1)"),
    Action("line_down", "Line down", "scroll down by a line", "ctrl+down", "line(1)"),
    Action("answer_start", "To its start", "go to the start of the last answer", "ctrl+home"),
    Action("follow", "To the end", "go to the end, and follow the answer", "end"),
    # by name
    Action("model", "Model", "load another installed pair; alone: what is loaded",
           command="/model", argument="[PAIR]"),
    Action("bench", "Bench", "measure for some seconds: plain, drafted, as many as pay",
           command="/bench"),
    Action("stats", "Figures", "the figures of the last answer", command="/stats"),
    Action("copy_answer", "Copy the answer", "copy the last answer, or its last code block",
           command="/copy", argument="[code]"),
    Action("system", "System prompt", "set the system prompt; alone: none", command="/system",
           argument="[TEXT]"),
    Action("set", "Setting", "temperature, top_p, top_k, seed …; alone: what is set",
           call="set_option", command="/set", argument="[key=value]"),
    Action("draft", "Drafting", "draft as many tokens as pay, a fixed number, or none",
           command="/draft", argument="on|off|auto|K"),
    Action("file", "Include a file", "put a file's text into the message", command="/file",
           argument="PATH"),
    Action("export", "Export", "write the chat as Markdown, or as .json", command="/export",
           argument="PATH"),
    Action("theme", "Theme", "colours: dark, light, or the terminal's own", command="/theme",
           argument="NAME"),
)  # fmt: skip

BY_ID = {action.id: action for action in ACTIONS}
COMMANDS = {action.command: action for action in ACTIONS if action.command}
_NAMES = {
    "escape": "Esc", "enter": "Enter", "pageup": "PageUp", "pagedown": "PageDown", "up": "Up",
    "down": "Down", "left": "Left", "right": "Right", "end": "End", "home": "Home", "tab": "Tab",
}  # fmt: skip


def in_scope(scope: str) -> Iterable[Action]:
    """The actions whose keys work there."""
    return (action for action in ACTIONS if action.scope == scope and action.keys)


def usual_keys() -> Keymap:
    """The keys of every action that has some, while nobody sets others."""
    return {action.id: action.keys for action in ACTIONS if action.keys}


def keys_of(action: Action, keymap: Keymap) -> str:
    """The keys that do it now."""
    return keymap.get(action.id, action.keys)


def key_words(keys: str, short: bool = False) -> str:
    """Keys as a person says them, Ctrl+N; in a footer the first of them alone, ^N."""
    said = [_key_word(key, short) for key in keys.split(",")]
    return said[0] if short else ", ".join(said)


def _key_word(key: str, short: bool) -> str:
    *modifiers, last = key.strip().split("+")
    last = _NAMES.get(last, last.upper() if len(last) <= 3 and (modifiers or last[1:]) else last)
    if short and modifiers == ["ctrl"]:
        return f"^{last}"
    return "+".join([*(modifier.capitalize() for modifier in modifiers), last])
