"""Beginnings of user turns, so that self-written chats cover what people ask.

A chat model left alone at the user header asks a narrow range of questions. These few words steer
it; it writes the rest of the turn itself. Self-written: no benchmark's text is among them.
"""

from __future__ import annotations

import random
from itertools import product

_TOPICS = (
    "photosynthesis", "black holes", "supply and demand", "recursion", "the French Revolution",
    "vaccines", "electric cars", "climate change", "the Roman Empire", "machine learning",
    "blockchain", "plate tectonics", "inflation", "Buddhism", "jazz music", "DNA replication",
    "quantum entanglement", "the stock market", "renewable energy", "Shakespeare's tragedies",
    "public-key encryption", "the immune system", "game theory", "volcanoes", "neural networks",
    "the water cycle", "existentialism", "chess openings", "sleep", "the Cold War", "gravity",
    "acids and bases", "marketing a small business", "binary search trees", "urban planning",
    "the circulatory system", "probability", "utilitarianism", "coffee brewing", "remote work",
)  # fmt: skip
_NAMES = (
    "Maria", "Tom", "Aisha", "Ben", "Chloe", "Diego", "Emma", "Farid", "Grace", "Hiro", "Ines",
    "Jack", "Kofi", "Lena", "Marcus", "Nina", "Oscar", "Priya", "Quinn", "Rosa", "Sam", "Tara",
    "Victor", "Wendy", "Yusuf", "Zoe",
)  # fmt: skip
_THINGS = (
    "apples", "marbles", "books", "cookies", "pencils", "stickers", "eggs", "tickets", "flowers",
    "shirts", "candles", "toy cars", "boxes of chocolates", "litres of paint", "coins", "fish",
)  # fmt: skip
_ROLES = (
    "a pirate captain", "a medieval knight", "a travel guide in Kyoto", "a strict maths teacher",
    "a detective in London", "a robot that has just learned to feel", "an astronaut on Mars",
    "a famous chef", "a job interviewer", "a doctor", "a historian", "a stand-up comedian",
    "a wise old wizard", "a physicist", "a football coach", "a personal trainer",
    "a time traveller", "a Linux terminal", "a therapist", "a startup founder", "a poet",
    "an English teacher",
)  # fmt: skip
_PIECES = (
    "a short story about", "a poem about", "a blog post about", "a formal email to", "a letter to",
    "a persuasive essay on", "a product description for", "a dialogue between", "a song about",
    "a speech about", "a limerick about", "a cover letter for", "a news article about",
    "a review of", "a haiku about", "a fairy tale about", "a business plan for", "a tweet about",
    "the opening paragraph of", "a scene in which", "an outline for", "a list of tips for",
)  # fmt: skip
_LANGUAGES = ("Python", "JavaScript", "C++", "Java", "SQL", "Rust", "Bash", "HTML and CSS", "C")
_TASKS = (
    "that reverses", "that checks whether", "that counts", "that returns the", "that sorts",
    "to find the", "that takes a list of", "that reads a file and", "to compute", "that removes",
    "that converts", "that merges two", "that prints",
)  # fmt: skip
_FUNCTIONS = (
    "is_", "count_", "find_", "get_", "sum_of_", "remove_", "sort_", "max_", "merge_", "string_",
    "filter_", "reverse_", "convert_", "list_", "calculate_", "check_", "split_", "unique_",
    "next_",
)  # fmt: skip
_FIXED = (
    "Hello", "Hi,", "Hi! Can you", "Can you help me", "Could you please", "I need", "I want to",
    "I'm trying to", "How do I", "How can I", "How does", "How many", "How much", "How would you",
    "What is", "What are", "What is the", "What's the difference between", "What would happen if",
    "What are some", "What are the main", "Why is", "Why do", "Why does", "Who was",
    "Who invented", "When did", "Where is", "Which of the following", "Is it true that",
    "Is it possible to", "Should I", "Do you think", "Tell me about", "Tell me a", "Give me",
    "Give an example of", "Give me five", "Give me a step-by-step", "List", "List three",
    "List the", "Name", "Name five", "Describe", "Describe the", "Discuss",
    "Discuss the impact of", "Analyze", "Analyze the following", "Evaluate",
    "Evaluate the following", "Argue for", "Argue against", "Compare", "Compare and contrast",
    "Contrast", "Define", "Define the term", "Explain", "Explain how", "Explain why",
    "Explain the concept of", "Explain the process of", "Explain in simple terms", "Suggest",
    "Recommend", "Suppose", "Suppose you", "Imagine", "Imagine that", "Consider", "Consider the",
    "Assume that", "Let's", "Let x", "If a", "If I", "If you", "Given", "Given the", "Given that",
    "Given a set of", "Given the following", "Based on the", "Read the following passage",
    "Read the text below and", "Summarize", "Summarize the following", "Summarize this article:",
    "Summarise in one sentence:", "Rewrite", "Rewrite the following", "Rewrite this sentence",
    "Rewrite your answer", "Rephrase", "Paraphrase the following", "Edit the following",
    "Correct the grammar", "Fix the errors in", "Proofread this", "Make this more formal:",
    "Make this shorter:", "Improve the following", "Translate", "Translate the following",
    "Translate into French:", "Convert", "Convert the following", "Classify",
    "Classify the following", "Identify", "Identify the", "Extract", "Extract the",
    "Extract all the names from", "Extract the following information", "From the following text,",
    "Answer the following question", "Answer with yes or no:", "Fill in the blank",
    "Choose the correct", "True or false:", "Match the", "Rank the", "Sort the following",
    "Complete the sentence", "Complete the following", "Continue the story:", "Finish this",
    "Write", "Write a", "Write an", "Write about", "Write a paragraph", "Write a 200-word",
    "Write the following", "Create", "Create a", "Create a table", "Create a JSON", "Design",
    "Design a", "Develop a", "Draft", "Compose", "Compose a", "Generate", "Generate a",
    "Generate a list of", "Come up with", "Brainstorm", "Plan a", "Plan a three-day trip to",
    "Organize", "Outline", "Propose", "Prepare", "Build", "Solve", "Solve the following",
    "Solve for x:", "Solve this step by step:", "Find", "Find the", "Find the value of",
    "Find all", "Calculate", "Calculate the", "Compute", "Determine", "Determine whether",
    "Prove that", "Simplify", "Factor", "Evaluate the integral", "Estimate", "Show that",
    "Show me", "Think step by step.", "Here is", "Here is a", "Below is",
    "Below is an instruction", "The following", "The sum of", "The product of", "The area of",
    "The perimeter of", "The price of", "The average of", "The ratio of", "The length of",
    "The probability", "There are", "There were", "In a", "In the", "In what", "In which",
    "In a class of", "At a", "A train", "A car", "A farmer has", "A store sells", "A shop",
    "A baker", "A rectangle", "A triangle", "A box contains", "A bag contains", "A teacher",
    "A company", "A recipe", "A school", "A garden", "A tank", "A book has", "A man", "A woman",
    "A group of", "Two friends", "Three people", "Each", "Every day,", "Every week,", "One day,",
    "Last year,", "Yesterday,", "Today", "On Monday,", "After", "Before", "During", "For a",
    "For each", "My", "My friend", "My son", "Our", "We", "You are", "You are given", "You are a",
    "You have", "Your task is to", "Act as", "Act as a", "Pretend", "Play the role of",
    "Pretend to be", "Roleplay:", "As a", "As an expert", "Please", "Please explain",
    "Please write", "Please provide", "Please list", "Help me", "def ", "class ", "import ",
    "function ", "SELECT ", "#include", "```python\n", "```\n",
    "Complete the following code:\n```python\ndef", "Complete the function:\n\ndef",
    "Finish this Python function:\n\ndef", "What does this code do?\n```", "Debug this code:",
    "Fix the bug in this code:\n```python\n", "Explain this code:\n",
    "Optimize the following code:", "from typing import List\n\n\ndef ", "import math\n\n\ndef ",
    "Write a regular expression", "Write a SQL query", "Write a script", "Write a program",
    "Write a unit test", "Write a class", "Implement", "Implement a", "Implement the", "Refactor",
    "How do I implement", "Question:", "Q:", "Problem:", "Task:", "Instruction:", "Context:",
    "Passage:", "Text:", "Input:", "Title:", "Topic:", "1.", "-", "\"", "(", "What", "How", "Why",
    "Can", "The", "I", "A", "In", "It",
)  # fmt: skip


def _combined() -> list[str]:
    rng = random.Random(20)
    out = [f"Explain {topic} to" for topic in _TOPICS]
    out += [f"What is {topic}" for topic in _TOPICS]
    out += [f"How does {topic} affect" for topic in _TOPICS[::2]]
    out += [f"Compare {a} and {b}" for a, b in zip(_TOPICS[::2], _TOPICS[1::2], strict=True)]
    out += [f"Write {piece}" for piece in _PIECES]
    out += [f"Can you write {piece}" for piece in _PIECES[::2]]
    out += [f"Write {piece} {topic}" for piece, topic in zip(_PIECES, _TOPICS, strict=False)]
    roles = ("Imagine you are", "Pretend you are", "You are", "Act as", "Answer as if you were")
    out += [f"{rng.choice(roles)} {role}." for role in _ROLES]
    out += [f"{rng.choice(roles)} {role}" for role in _ROLES]
    verbs = ("has", "buys", "sells", "bakes", "collects", "had", "wants to buy", "makes")
    for name in _NAMES:
        out.append(name)
        out.append(f"{name} {rng.choice(verbs)} {rng.randint(2, 90)} {rng.choice(_THINGS)}")
        out.append(f"{name} {rng.choice(verbs)} {rng.randint(2, 90)} {rng.choice(_THINGS)}")
        out.append(f"{name} {rng.choice(verbs)}")
        out.append(f"{name} and {rng.choice(_NAMES)}")
        out.append(f"If {name} {rng.choice(('works', 'walks', 'earns', 'reads', 'saves'))}")
    out += [
        f"Write a {language} function {task}" for language, task in product(_LANGUAGES[:2], _TASKS)
    ]
    out += [f"Write a {language} program" for language in _LANGUAGES]
    out += [f"In {language}, how" for language in _LANGUAGES]
    for name in _FUNCTIONS:
        out.append(f"def {name}")
        out.append(f"Complete this function.\n\ndef {name}")
        out.append(f"Write the body of this Python function:\n```python\ndef {name}")
    return out


def openers() -> list[str]:
    """All beginnings, without repeats, in a fixed order; none ends in a space."""
    return list(dict.fromkeys(text.rstrip(" ") for text in (*_FIXED, *_combined())))


SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a concise assistant. Answer in a few sentences.",
    "You are an expert programmer.",
    "You are a patient teacher. Explain step by step.",
    "Answer truthfully and briefly.",
    "You are a friendly chatbot who loves to help.",
    "You are a creative writer.",
    "You are an AI assistant. Follow the user's instructions carefully.",
)
