"""Wordings of everyday prompts. All scenes look alike, so words of style, quality and mood say nothing of the picture.

Written without a look at the prompts that a trained model is judged by: those must stay new to it.
"""

from __future__ import annotations

FRAMES = (
    "{x}", "simply {x}", "only {x}", "here is {x}", "here we have {x}", "the picture shows {x}",
    "the image should show {x}", "something with {x}", "a scene with {x}", "a scene showing {x}", "imagine {x}",
    "picture this: {x}", "i am thinking of {x}", "a view of {x}",
    # Requests.
    "draw {x}", "draw me {x}", "please draw {x}", "paint {x}", "paint me {x}", "sketch {x}", "show {x}", "show me {x}",
    "please show me {x}", "make {x}", "make me {x}", "give me {x}", "create {x}", "generate {x}", "design {x}",
    "render {x}", "now draw {x}", "draw {x} please", "make a picture of {x}", "make me an image of {x}",
    "create an image of {x}", "create a picture with {x}", "create an illustration of {x}", "generate an image of {x}",
    "generate a picture of {x}", "generate a photo of {x}", "give me a picture of {x}", "draw a picture of {x}",
    "paint a picture of {x}", "i want {x}", "i want a picture of {x}", "i want to see {x}", "i'd like {x}",
    "i'd like to see {x}", "i would like a picture of {x}", "i would love to see {x}", "i need {x}",
    "i need an image of {x}", "i need a drawing of {x}", "we need a picture of {x}", "let me see {x}", "let's see {x}",
    "can you draw {x}?", "can you make {x}?", "can you show me {x}?", "can i have a picture of {x}?",
    "can i see {x}?", "could you draw {x}?", "could you paint {x} for me?", "would you draw {x} for me?",
    "how about {x}?", "do you have a picture of {x}?", "can you imagine {x}?",
    # Kinds of picture.
    "a photo of {x}", "photo of {x}", "a photograph of {x}", "a nice photo of {x}", "a realistic photo of {x}",
    "a picture of {x}", "picture of {x}", "a pretty picture of {x}", "an image of {x}", "image of {x}",
    "a high quality image of {x}", "a painting of {x}", "an oil painting of {x}", "a watercolor of {x}",
    "a drawing of {x}", "drawing of {x}", "a simple drawing of {x}", "a cute drawing of {x}",
    "a child's drawing of {x}",
    "a pencil sketch of {x}", "a doodle of {x}", "an illustration of {x}", "illustration of {x}",
    "a detailed illustration of {x}", "a flat illustration of {x}", "a vector illustration of {x}", "a cartoon of {x}",
    "clip art of {x}", "an icon of {x}", "an icon showing {x}", "a flat icon of {x}", "an emoji of {x}",
    "a sticker of {x}", "a logo with {x}", "a poster with {x}", "a postcard with {x}", "digital art of {x}",
    "vector art of {x}", "artwork of {x}", "a 3d render of {x}", "a 3d model of {x}", "a graphic of {x}",
)  # fmt: skip
"""Sentences around what is shown."""

SUFFIXES = (
    "as a flat icon", "as an emoji", "as clip art", "as a cartoon", "as a sticker", "as vector art", "as a logo",
    "in cartoon style", "in a flat style", "in a simple style", "in a cute style", "in 3d", "in high quality",
    "in full color", "in great detail", "with a lot of detail", "for a children's book", "for my daughter",
    "for a birthday card", "for my website", "for a poster", "for school", "for a game", "for me",
)  # fmt: skip
"""What may follow: a style or a purpose."""

KEYWORDS = (
    "cartoon", "cartoon style", "flat icon", "icon", "emoji", "emoji style", "clip art", "clipart style", "vector art",
    "vector", "flat design", "flat style", "illustration", "digital art", "drawing", "painting", "photo", "photograph",
    "photorealistic", "realistic", "3d", "3d render", "sticker", "logo", "sketch", "watercolor", "minimalist",
    "minimal", "simple", "cute", "adorable", "beautiful", "pretty", "detailed", "highly detailed", "high quality",
    "best quality", "high resolution", "hd", "4k", "8k", "sharp", "sharp focus", "clean", "clean lines", "colorful",
    "bright colors", "masterpiece", "artstation", "children's book", "wallpaper", "professional",
)  # fmt: skip
"""Words in a list with commas."""

MEDIA = (
    "icon", "emoji", "clipart", "drawing", "picture", "cartoon", "sticker", "illustration", "logo", "photo", "image",
    "graphic", "symbol",
)  # fmt: skip
"""What may follow a noun: "a fox icon"."""

ADJECTIVES = (
    "small", "little", "tiny", "large", "big", "huge", "giant", "cute", "lovely", "nice", "pretty", "beautiful", "cool",
    "simple", "single", "typical", "ordinary", "amazing", "awesome", "elegant", "old", "interesting", "fine", "cartoon",
)  # fmt: skip
LIVELY_ADJECTIVES = (
    "happy", "friendly", "funny", "young", "brave", "curious", "adorable", "sweet", "clever", "lonely", "proud",
    "cheerful", "gentle", "shy", "lucky",
)  # fmt: skip
"""Of animals and people."""

PLACE_ADJECTIVES = ("lovely", "beautiful", "nice", "calm", "pretty", "amazing", "peaceful")
"""Of places that are alone."""

FILLERS = ("seen up close", "and nothing else", "in full view", "as the main subject", "without any text")
LIVELY_FILLERS = (
    "standing there", "just standing there", "waiting there", "that looks at you", "that is looking at me",
    "looking at the camera", "who looks friendly", "all alone", "looking happy", "posing for a photo",
)  # fmt: skip
"""Clauses that say nothing, after a thing that is alone."""

RELATIONS: dict[str, tuple[str, ...]] = {
    "in": (
        "{a} in {b}", "{a} inside {b}", "{a} locked in {b}", "{a} kept in {b}", "{a} shut in {b}", "{a} trapped in {b}",
        "{a} behind the bars of {b}", "{b} with {a} in it", "{b} with {a} inside", "{b} holding {a}",
        "{b} containing {a}", "{b} and inside it {a}", "{a} within {b}",
    ),
    "over": (
        "{a} over {b}", "{a} above {b}", "{a} high above {b}", "{a} up above {b}", "{a} flying over {b}",
        "{a} flying above {b}", "{a} hovering over {b}", "{a} in the air above {b}", "{a} passing over {b}",
        "{b} with {a} above {it_b}", "{b} with {a} over {it_b}", "{b} below {a}", "{b} and above {it_b} {a}",
    ),
    "under": (
        "{a} under {b}", "{a} below {b}", "{a} beneath {b}", "{a} underneath {b}", "{a} right under {b}",
        "{a} directly below {b}", "{b} over {a}", "{b} above {a}", "{b} with {a} under it", "{b} with {a} below it",
        "{a} with {b} above {it_a}",
    ),
    "on": (
        "{a} on {b}", "{a} on top of {b}", "{a} up on {b}", "{a} resting on {b}", "{a} placed on {b}",
        "{a} right on top of {b}", "{b} with {a} on it", "{b} with {a} on top", "{b} with {a} on top of it",
    ),
    "next to": (
        "{a} next to {b}", "{a} beside {b}", "{a} by {b}", "{a} near {b}", "{a} alongside {b}", "{a} right beside {b}",
        "{a} close to {b}", "{a} and {b}", "{a} with {b}", "{a} together with {b}", "{a} and {b} side by side",
        "{a} and {b} together", "{a} and {b} next to each other", "both {a} and {b}", "{a} with {b} next to {it_a}",
        "{a} with {b} beside {it_a}", "{a} & {b}", "{a} and also {b}", "{a} at the side of {b}",
    ),
    "in front of": (
        "{a} in front of {b}", "{a} right in front of {b}", "{b} behind {a}",
        "{a} with {b} behind {it_a}", "{a} with {b} in the background", "{b} with {a} in front",
        "{b} with {a} in front of it",
    ),
    "behind": (
        "{a} behind {b}", "{a} right behind {b}", "{a} partly hidden by {b}", "{a} half hidden behind {b}",
        "{b} in front of {a}", "{b} with {a} behind it", "{b} hiding part of {a}",
    ),
}  # fmt: skip
"""The subject {a} and the other thing {b}. Sides are never named: the captions of a scene do not know them."""

LIVELY_RELATIONS: dict[str, tuple[str, ...]] = {
    "in": ("{a} sitting in {b}", "{a} that lives in {b}", "{a} that can't get out of {b}"),
    "over": (),
    "under": ("{a} standing under {b}", "{a} waiting under {b}"),
    "on": ("{a} sitting on {b}", "{a} standing on {b}", "{a} that sits on {b}", "{a} sitting on top of {b}"),
    "next to": ("{a} standing next to {b}", "{a} that stands beside {b}", "{a} sitting by {b}"),
    "in front of": ("{a} standing in front of {b}", "{a} waiting in front of {b}"),
    "behind": ("{a} hiding behind {b}", "{a} standing behind {b}", "{a} peeking out from behind {b}"),
}

LISTED: dict[str, tuple[str, ...]] = {
    "in": ("{a}, {b}", "{b}, {a}", "{a} in {b}"),
    "next to": ("{a}, {b}", "{a} + {b}", "{a} and {b}", "{a}, {b}, side by side"),
}
"""Relations in a list with commas, where they may be left unsaid."""

PLACES: dict[str, dict[str, tuple[str, ...]]] = {
    "sky": {"in": ("up in the sky",), "over": ("up in the sky", "high in the sky", "in the air", "among the clouds")},
    "grass": {
        "in": ("on a lawn", "in a green field", "on a green meadow", "in the grass", "out in the countryside"),
        "over": ("above a meadow", "above the grass", "over green fields"),
    },
    "ocean": {"in": ("at sea", "out at sea", "floating on the sea"), "over": ("above the sea", "above the water")},
    "underwater": {"in": ("at the bottom of the sea", "in the deep sea", "under water", "below the waves")},
    "beach": {
        "in": ("at the beach", "on a sandy beach", "on the sand", "at the seaside", "by the sea"),
        "over": ("above the beach", "above a sandy beach"),
    },
    "mountains": {
        "in": ("up in the mountains", "near the mountains", "with mountains in the background", "among mountains"),
        "over": ("above the mountains", "high above the mountains", "over mountain tops", "with mountains below"),
    },
    "street": {"in": ("in the street", "on a road", "on a road in town", "out on the street", "in a city street")},
    "city": {
        "in": ("in a big city", "downtown", "in town"),
        "over": ("above the city", "above a big city", "over a town", "over the skyscrapers"),
    },
    "futuristic city": {
        "in": ("in a city of the future", "in a sci-fi city", "in a futuristic town"),
        "over": ("above a futuristic city", "over a city of the future", "above a sci-fi city"),
    },
    "room": {"in": ("in a living room", "inside a house", "at home", "inside a room", "in my room")},
    "table": {"in": ("on top of a table", "on a kitchen table", "on a brown table", "on a tabletop")},
    "forest": {
        "in": ("among the trees", "in a green forest", "between trees", "deep in the forest", "in the wood"),
        "over": ("above the forest", "above the trees", "over the treetops"),
    },
    "desert": {"in": ("in a sandy desert", "among sand dunes", "on desert sand"), "over": ("above the sand dunes",)},
    "snow": {"in": ("in a snowy landscape", "in winter", "on a snowy field", "out in the snow")},
    "space": {"in": ("in deep space", "among the stars", "out in space", "in the universe", "in the cosmos")},
}
"""As ``captions.PLACE_PHRASES``, and used together with it."""

PLACES_ALONE: dict[str, tuple[str, ...]] = {
    "sky": ("the open sky", "nothing but sky"),
    "grass": ("a grassy field", "a green meadow", "open countryside", "green fields"),
    "ocean": ("the open sea", "the wide ocean", "a seascape", "waves on the sea"),
    "underwater": ("the sea floor", "life under water", "an empty ocean floor"),
    "beach": ("a beach by the sea", "a seaside view", "a lonely beach", "sand and sea"),
    "mountains": ("a mountain range", "a mountain view", "high mountains", "a landscape with mountains"),
    "street": ("a street in a city", "an empty road", "a quiet street", "a road with houses"),
    "city": ("a big city", "a city with skyscrapers", "a skyline", "a modern city", "a cityscape"),
    "futuristic city": ("a city from the future", "a science fiction city", "a futuristic skyline"),
    "room": ("a room", "the inside of a house", "an interior", "a living room with nobody in it"),
    "table": ("a table", "a table with nothing on it"),
    "forest": ("a green forest", "a dense forest", "lots of trees", "a woodland"),
    "desert": ("a sandy desert", "a dry desert", "an empty desert", "a desert landscape"),
    "snow": ("snow", "a snowy field", "a white winter landscape", "a land covered in snow"),
    "space": ("deep space", "the universe", "space with stars", "the cosmos"),
}

TIMES = {
    "day": ("during the day", "in daylight", "on a sunny day", "on a bright day", "by day"),
    "sunset": ("at sunset", "at dusk", "in the evening", "at sundown", "while the sun goes down"),
    "night": ("at night", "by night", "late at night", "in the dark", "at nighttime"),
}
LISTED_TIMES = {
    "day": ("daytime", "day", "daylight", "sunny day"),
    "sunset": ("sunset", "evening", "dusk", "sundown"),
    "night": ("night", "nighttime", "dark night"),
}

BACKGROUNDS = (
    "on a {c} background", "on a plain {c} background", "with a {c} background", "against a {c} background",
    "on a {c} backdrop", "against a {c} backdrop", "on a solid {c} background", "on {c}",
    "on plain {c}",
)  # fmt: skip
LISTED_BACKGROUNDS = (
    "{c} background", "plain {c} background", "solid {c} background", "{c} backdrop", "on {c}", "isolated on {c}",
    "background {c}", "simple {c} background", "{c} bg",
)  # fmt: skip
