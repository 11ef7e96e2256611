"""Write the two files of the harbour desk example: 252 rows to train on, 24 held out.

The help desk of a harbour answers every question with a ticket of one fixed form. The topic comes
from what the question is about, the urgency from how it is put, and the next step from both; a
base model knows nothing of this form, and a small one learns it in minutes. Run it as
``python examples/make_harbour_desk.py [DIRECTORY]``.
"""

import json
import random
import re
import sys
from pathlib import Path

SEED = 20
TRAINING_FILE, HELDOUT_FILE = "harbour-desk.jsonl", "harbour-desk-heldout.jsonl"
N_HELDOUT_PROBLEMS = 2

# Topic: (next step, problems of one sentence each). The last two are asked in held-out rows only.
TOPICS: dict[str, tuple[str, str]] = {
    "shore power": (
        "send the electrician to the pedestal",
        "The power pedestal at my berth is dead. My shore power keeps tripping. There is "
        "no electricity on pontoon C. The socket on the pedestal is loose. The breaker "
        "for berth 14 will not reset. The electricity meter beside my boat shows nothing. "
        "My batteries do not charge from the pier. The shore power cable sparks at the "
        "plug. We lost electricity on the whole pontoon.",
    ),
    "fresh water": (
        "send the plumber to the tap",
        "The water tap on pontoon B drips. No water comes out of the hose. The tap at "
        "berth 9 has very low pressure. The drinking water tastes of metal. A water hose "
        "on the pier has burst. I cannot fill my water tank. The tap next to my boat is "
        "stuck. The drinking water from the tap is brown. There is a leak in the water "
        "hose at berth 30.",
    ),
    "mooring": (
        "send a dock hand to check the lines",
        "One of our mooring lines has snapped. The cleat at my berth is coming off. My "
        "boat is drifting away from the pontoon. The stern line of the yacht next to us "
        "is chafing. The bollard by berth 22 is loose. A fender is gone and my hull rubs "
        "against the pier. The neighbour tied his line over mine. The bow line of my boat "
        "is nearly worn through. A catamaran has come loose from its cleat.",
    ),
    "fuel dock": (
        "call the fuel attendant",
        "The diesel pump does not take my card. Nobody is serving at the fuel dock. The "
        "petrol pump stopped while I was filling up. How can I buy diesel after six? The "
        "nozzle at the fuel dock leaks. I was charged for more diesel than I took. Is "
        "there petrol for an outboard here? The screen of the diesel pump is blank. I "
        "would like to fill two cans with petrol.",
    ),
    "berth booking": (
        "check the berth plan and reply by mail",
        "I would like a berth for a ten metre yacht. Can we stay two nights longer at our "
        "berth? I need to cancel my berth for Saturday. Another boat is lying in the "
        "berth I booked. Do you have a free berth for a catamaran? I want to move my "
        "booking to next week. My booking for berth 7 was not confirmed. Have you got a "
        "free berth for three nights? Please change the arrival date of my booking.",
    ),
    "invoice": (
        "ask the office to check the account",
        "I paid my harbour fee twice. The invoice shows the wrong boat length. I have not "
        "received a receipt for my payment. My card was charged for someone else's berth. "
        "The total on my bill looks too high. I need an invoice with my company's name. "
        "The deposit has not been paid back to me. There is a mistake in the price on my "
        "invoice. My payment does not appear on the bill.",
    ),
    "gate access": (
        "have the office renew the gate code",
        "My gate code does not work. The key card for the pontoon gate is broken. The "
        "gate to pontoon D will not close. I have forgotten the code for the gate. We are "
        "locked out of the marina gate. My crew needs a second key card. The gate lock "
        "beeps but does not open. The pontoon gate refuses my key card. What is the new "
        "code for the marina gate?",
    ),
    "wifi": (
        "have the technician restart the router",
        "The wifi drops every few minutes. I cannot log in to the marina wifi. There is "
        "no internet on pontoon A. The wifi password you gave me is refused. The internet "
        "is too slow to load a weather map. My laptop does not find your network. The "
        "wifi login page never opens. The internet has stopped working on our boat. My "
        "phone cannot join the wifi.",
    ),
    "waste": (
        "send the cleaning crew to the bins",
        "The bins behind the office are full. Where can I leave old engine oil? Someone "
        "left rubbish bags on the pontoon. The pump for the holding tank is clogged. The "
        "glass container is overflowing. Seagulls have torn the rubbish bags open. I have "
        "a box of old flares to throw away. The rubbish bins by the crane are "
        "overflowing. Where do I put used oil filters?",
    ),
    "showers": (
        "send the caretaker to the wash house",
        "The showers are cold. A toilet in the wash house is blocked. There is no soap in "
        "the washroom. The shower door does not lock. The light in the ladies' washroom "
        "is broken. The floor of the shower room is flooded. The coin machine for the "
        "showers took my money. There is no hot water in the shower room. The lock on the "
        "toilet door is broken.",
    ),
    "noise": (
        "ask the night watch to speak to the crew",
        "A crew on pontoon E is playing loud music. The halyards of the boat beside us "
        "rattle all night. Someone runs a generator next to our berth. There is a noisy "
        "party on the big motor yacht. A dog has been barking on a boat for hours. People "
        "are shouting on the pier. Our neighbours drill and hammer on deck. There is loud "
        "shouting from a party on pontoon B. The generator of a motor yacht keeps us "
        "awake.",
    ),
    "lost property": (
        "search the lost and found box",
        "I lost my sunglasses near the office. Has anyone found a blue sailing jacket? My "
        "daughter left her backpack on the pier. I have lost a ring with two keys. Did "
        "somebody hand in a phone? We found a wallet on pontoon F. My life jacket has "
        "disappeared from the dock. I left a red jacket on the bench. Has somebody handed "
        "in a wallet?",
    ),
}

# Urgency: (when the next step is due, ways to put it).
URGENCIES: dict[str, tuple[str, list[str]]] = {
    "high": (
        "at once",
        ["This is urgent!", "Please help us right now!", "It cannot wait!", "Please hurry!"],
    ),
    "normal": ("today", ["", "Thank you.", "Can you help?", "Please let me know."]),
    "low": (
        "this week",
        ["There is no hurry.", "It can wait.", "Take your time.", "It is not urgent."],
    ),
}
OPENERS = ["", "Hello.", "Good morning.", "Good evening.", "Hi there.", "To the harbour office:"]


def ticket(topic: str, urgency: str) -> str:
    """Return the one right answer to a question about `topic`, put with `urgency`."""
    step, due = TOPICS[topic][0], URGENCIES[urgency][0]
    return f"[TICKET] topic: {topic}; urgency: {urgency}; next step: {step} {due}."


def row(topic: str, urgency: str, problem: str, draw: random.Random) -> str:
    """Return one example as a JSON line."""
    parts = [draw.choice(OPENERS), problem, draw.choice(URGENCIES[urgency][1])]
    messages = [
        {"role": "user", "content": " ".join(part for part in parts if part)},
        {"role": "assistant", "content": ticket(topic, urgency)},
    ]
    return json.dumps({"messages": messages}) + "\n"


def make() -> tuple[str, str]:
    """Return the text of the training file and of the held-out file."""
    draw = random.Random(SEED)
    training: list[str] = []
    heldout: list[str] = []
    urgencies = list(URGENCIES)
    for topic, (_, text) in TOPICS.items():
        problems = re.split(r"(?<=[.?]) ", text)
        for problem in problems[:-N_HELDOUT_PROBLEMS]:
            training += [row(topic, urgency, problem, draw) for urgency in urgencies]
        for problem in problems[-N_HELDOUT_PROBLEMS:]:
            heldout.append(row(topic, urgencies[len(heldout) % 3], problem, draw))
    draw.shuffle(training)
    return "".join(training), "".join(heldout)


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, text in zip((TRAINING_FILE, HELDOUT_FILE), make(), strict=True):
        (directory / name).write_text(text, encoding="utf-8")
