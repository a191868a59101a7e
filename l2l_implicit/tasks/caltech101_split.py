"""The 64 / 16 / 20 split of Caltech 101's categories, drawn once at random.

Left out: BACKGROUND_Google, which is no category, and Faces_easy, the faces of Faces cropped.
"""

SPLIT: dict[str, tuple[str, ...]] = {
    "train": (
        "Faces", "Leopards", "Motorbikes", "accordion", "airplanes", "anchor", "ant", "barrel",
        "bass", "binocular", "bonsai", "brontosaurus", "butterfly", "camera", "cannon", "car_side",
        "chandelier", "cougar_body", "cougar_face", "crayfish", "crocodile", "crocodile_head",
        "dalmatian", "dollar_bill", "dragonfly", "electric_guitar", "elephant", "ewer", "flamingo",
        "flamingo_head", "garfield", "gerenuk", "grand_piano", "hedgehog", "ibis", "inline_skate",
        "joshua_tree", "kangaroo", "ketch", "lamp", "laptop", "llama", "lotus", "mandolin",
        "mayfly", "menorah", "metronome", "octopus", "pagoda", "pizza", "pyramid", "revolver",
        "rhino", "rooster", "schooner", "scorpion", "snoopy", "stegosaurus", "tick", "trilobite",
        "umbrella", "watch", "wheelchair", "yin_yang",
    ),
    "validation": (
        "buddha", "ceiling_fan", "cellphone", "cup", "dolphin", "helicopter", "panda", "platypus",
        "saxophone", "scissors", "stapler", "starfish", "sunflower", "water_lilly", "windsor_chair",
        "wrench",
    ),
    "test": (
        "beaver", "brain", "chair", "crab", "emu", "euphonium", "ferry", "gramophone", "hawksbill",
        "headphone", "lobster", "minaret", "nautilus", "okapi", "pigeon", "sea_horse",
        "soccer_ball", "stop_sign", "strawberry", "wild_cat",
    ),
}
