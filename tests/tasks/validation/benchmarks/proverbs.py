"""Real text for benchmarks in tests."""

PROVERBS = [
    ("Aller Anfang ist schwer.", "All beginnings are hard."),
    ("Morgenstund hat Gold im Mund.", "The early bird catches the worm."),
    ("Übung macht den Meister.", "Practice makes perfect."),
    ("Ohne Fleiß kein Preis.", "No pain, no gain."),
    ("Wer rastet, der rostet.", "A rolling stone gathers no moss."),
    ("Viele Köche verderben den Brei.", "Too many cooks spoil the broth."),
    ("Der Apfel fällt nicht weit vom Stamm.", "The apple does not fall far from the tree."),
    ("Stille Wasser sind tief.", "Still waters run deep."),
    ("Lügen haben kurze Beine.", "Lies have short legs."),
    ("Es ist nicht alles Gold, was glänzt.", "All that glitters is not gold."),
    ("Wer A sagt, muss auch B sagen.", "In for a penny, in for a pound."),
    ("Ende gut, alles gut.", "All is well that ends well."),
    ("Kleider machen Leute.", "Clothes make the man."),
    ("Der Ton macht die Musik.", "The tone makes the music."),
    ("Einmal ist keinmal.", "Once does not count."),
    ("Hunde, die bellen, beißen nicht.", "Barking dogs seldom bite."),
    ("Rom wurde nicht an einem Tag erbaut.", "Rome was not built in a day."),
    ("Reden ist Silber, Schweigen ist Gold.", "Speech is silver, silence is golden."),
    ("Geteiltes Leid ist halbes Leid.", "A trouble shared is a trouble halved."),
    ("Wo ein Wille ist, ist auch ein Weg.", "Where there is a will, there is a way."),
    ("Was ich nicht weiß, macht mich nicht heiß.", "What the eye does not see, the heart does not grieve over."),
    ("Vorsicht ist besser als Nachsicht.", "Better safe than sorry."),
    ("Not macht erfinderisch.", "Necessity is the mother of invention."),
    ("Zeit ist Geld.", "Time is money."),
]
"""German proverbs and what they are in English: common property."""
