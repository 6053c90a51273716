"""Chat prompts of the demo, from one line to a page."""

from __future__ import annotations

CHAT_QUESTIONS = (
    "Why is the sky blue?",
    "Give me three tips for learning the guitar.",
    "Write a short poem about the sea.",
    "What is the difference between a virus and a bacterium?",
)

SHORT = (
    "What is the capital of France?",
    "Name three primary colours.",
    "How many days are there in a leap year?",
    "Explain photosynthesis in two sentences.",
    "Write a haiku about autumn.",
    "Translate 'good morning' into Spanish.",
    "What does a compiler do?",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What is the boiling point of water at sea level?",
    "Write a Python function that reverses a string.",
    "Suggest a name for a small bakery by the harbour.",
)

PASSAGES = (
    "The tide turned a little after four, and the fishing boats came in one behind the other, low in the water and "
    "loud with gulls. On the quay the buyers were already waiting with their lists. Herring was cheap that week and "
    "cod was dear; nobody had seen a decent sole since the storm. Anna counted the crates twice, wrote the figure on "
    "the back of her hand, and went to find her brother, who had promised to help with the nets and had, as usual, "
    "found something better to do. By six the stalls were empty and the rain had started again.",
    "A hash table stores pairs of keys and values in an array. A function turns each key into a number, and the number "
    "modulo the length of the array says where the pair belongs. When two keys fall on the same place the table must "
    "either keep a short list there or look for the next free place. As long as the array is not too full, looking "
    "up a key takes the same time however many pairs there are. When it does fill up, a larger array is made and every "
    "pair is put in again. That is costly, but it happens so rarely that the average cost of an insertion stays small. "
    "The price of all this is memory, and the loss of any order among the keys: a tree keeps them sorted, a hash table "
    "does not. Most programming languages have one built in, and most programs lean on it every few lines.",
    "Minutes of the residents' meeting. Present: nineteen of the thirty-two flats. The chair opened the meeting at seven. "
    "First item: the lift. It has stopped eleven times since March. The maintenance company blames the door sensor and "
    "has offered to replace it for 840 euros; two members asked for a second quotation, and the meeting agreed. Second "
    "item: bicycles in the hallway. The fire officer has written again. A rack for twelve bicycles in the courtyard "
    "would cost 1,150 euros with installation. Fourteen in favour, three against, two abstentions; the treasurer will "
    "order it in May. Third item: the chestnut tree. The city has inspected it and finds it healthy, so it may not be "
    "felled, but the lower branches over the parking spaces can be cut in autumn. Fourth item: the accounts. Income was "
    "38,400 euros, expenses 36,950, and the reserve now stands at 21,300. The auditors had no objections and the board "
    "was discharged unanimously. Any other business: the cellar light has been repaired, and whoever keeps feeding the "
    "pigeons from the third floor is asked, once more and kindly, to stop. The meeting closed at twenty past eight.",
)

TASKS = (
    "Summarise this in one sentence.",
    "What is the most important number or fact in this text?",
    "Rewrite the first sentence for a child of eight.",
    "Write a title for this text.",
)

FOLLOW_UPS = (
    ("I am planning a weekend in the mountains.", "How nice! Do you like walking, or would you rather climb?"),
    ("Walking, and nothing too steep.", "Then choose valleys and lakes, and start early while it is cool."),
    ("What should I pack?", "Good shoes, a rain jacket, water, something to eat, a map and a small first-aid kit."),
    ("And for the evening?", "A warm sweater, a torch, and a book or a pack of cards."),
)


def prompts(count: int) -> list[list[dict[str, str]]]:
    """`count` conversations, each ending with the user: short questions, questions on a text, and longer talks."""
    kinds = (_short, _short, _on_text, _conversation)
    return [kinds[index % len(kinds)](index // len(kinds) * 2 + index % 2) for index in range(count)]


def _short(index: int) -> list[dict[str, str]]:
    question = SHORT[index % len(SHORT)]
    again = index // len(SHORT)
    return [_user(question if not again else f"{question} ({again + 1})")]


def _on_text(index: int) -> list[dict[str, str]]:
    return [_user(f"{TASKS[index // 2 % len(TASKS)]}\n\n{PASSAGES[index // 2 % len(PASSAGES)]}")]


def _conversation(index: int) -> list[dict[str, str]]:
    turns = index // 2 % len(FOLLOW_UPS) + 1
    talk = [m for ask, answer in FOLLOW_UPS[:turns] for m in (_user(ask), {"role": "assistant", "content": answer})]
    question = SHORT[(index // 2 * 5 + 3) % len(SHORT)]
    return [*talk, _user(f"One more thing: {question[0].lower()}{question[1:]}")]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}
