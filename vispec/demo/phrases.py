"""The tables of the language: every wording, and which visible property picks it.

Greedy decoding collapses what is random, so no wording is: each table below is indexed by
something that can be seen in the picture (colour, row, shape, size, direction, count) or read in
the question. Slots: {a} is "a small red heart", {n} the same without its article, {p0} to {p3} the
place in four fixed styles, {sim} a simile, {mood} a mood word.
"""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# The four styles of naming the nine places, in reading order. The parser knows exactly these.
PLACES = (
    ("top left corner", "top edge", "top right corner", "left edge", "very centre", "right edge",
     "bottom left corner", "bottom edge", "bottom right corner"),
    ("upper left", "upper middle", "upper right", "middle left", "dead centre", "middle right",
     "lower left", "lower middle", "lower right"),
    ("northwest", "north", "northeast", "west", "hub", "east", "southwest", "south", "southeast"),
    ("row one, column one", "row one, column two", "row one, column three",
     "row two, column one", "row two, column two", "row two, column three",
     "row three, column one", "row three, column two", "row three, column three"),
)

SMALL_WORDS = ("little", "small", "short", "petite", "tiny", "modest", "slender", "dainty")
LARGE_WORDS = ("big", "large", "tall", "grand", "huge", "broad", "wide", "great")
MOODS = (  # by colour: small, large
    ("bold", "fiery"), ("cheerful", "toasty"), ("sunny", "radiant"), ("calm", "lush"),
    ("serene", "deep"), ("royal", "mysterious"), ("gentle", "playful"), ("stern", "dramatic"),
)
SIMILES = (  # by shape: top, middle, bottom row
    ("round as a coin", "like a full moon at noon", "ready to roll away"),
    ("like a tidy window", "as steady as a box", "like a paving stone"),
    ("pointing at the sky", "like a tent in camp", "like some distant hill"),
    ("hanging like a kite", "balanced on its tip", "like a jewel dropped on carpet"),
    ("twinkling through the night", "with five sharp rays", "as if fallen from heaven"),
    ("like a plus sign", "with four equal arms", "marking buried treasure"),
    ("open inside like a doughnut", "like a wheel without spokes", "as hollow as a bracelet"),
    ("beating with love", "like a valentine card", "sweet as candy"),
)
GROUND_PHRASES = ("a plain ground", "a ground with stripes", "a field of dots",
                  "a checkered cloth")

# From the object told before to this one, by direction: E, SE, S, SW, W, NW, N, NE; near and far.
LEADS = (
    ("next door on the right", "across the board to the right"),
    ("diagonally down and rightward", "far down on the right"),
    ("straight below", "two floors beneath"),
    ("lower and leftward", "deep down on the left"),
    ("back to the left", "all the way over to the left"),
    ("up and leftward", "far up on the left"),
    ("directly above", "two floors higher"),
    ("climbing rightward", "far up on the right"),
)
TRAILS = (
    ("on the right of", "well to the right of"), ("below and right of", "low and far right of"),
    ("beneath", "far beneath"), ("below and left of", "low and far left of"),
    ("on the left of", "well to the left of"), ("above and left of", "high and far left of"),
    ("just above", "far above"), ("above and right of", "high and far right of"),
)

DESCRIBE = (  # by colour and row
    "{a} sits in the {p0}, {sim}",
    "the {p1} part belongs to {a} that seems {mood}",
    "down at the {p0} glows {a}, {sim}",
    "{a} hangs in the {p1}, {mood} and easy to notice",
    "halfway up, at {p3}, someone placed {a}",
    "near our base, towards the {p2}, lies {a} of {mood} character",
    "beside the {p0} shines {a}, as {mood} as any lamp",
    "your eye soon meets {a} in the {p1}, {sim}",
    "{a} brightens the {p0}, looking rather {mood}",
    "growing out of the {p2} comes {a}, {sim}",
    "{a} covers {p3} just as fresh moss would",
    "along this floor there is {a}, found in the {p1}",
    "high over everything, the {p0} holds {a}, {sim}",
    "{a} floats quietly towards the {p2}",
    "cool and {mood}, {a} rests in the {p1}",
    "{p3} shows {a}, {sim}",
    "one also finds {a} by the {p0}, {mood} in tone",
    "{a} guards the {p2} side, {sim}",
    "somebody painted {a} onto the {p1} zone",
    "what catches attention at the {p0} is {a}, {mood} to behold",
    "{p3} carries {a}, {sim}",
    "dark against paper, {a} marks the {p0}",
    "a heavy accent, {a}, stands in the {p1}, {sim}",
    "the {p2} end closes with {a}, {mood} and firm",
)
OPENINGS = (  # by phrasing of the question (three groups) and number of objects
    ("only a pair of shapes lives on {ground}.",
     "this picture keeps a trio of figures over {ground}.",
     "four figures share {ground} here.", "a handful of five items covers {ground}.",
     "half a dozen things crowd {ground}."),
    ("the board is nearly bare: two objects upon {ground}.",
     "we are looking at three objects, drawn on {ground}.",
     "this image presents four separate objects against {ground}.",
     "there are five objects to be seen above {ground}.",
     "it is a busy view: six objects scattered across {ground}."),
    ("let me begin: {ground} bears merely two marks.", "all right, {ground} supports three marks.",
     "gladly. The backdrop is {ground}, and it has four marks.",
     "with pleasure. Five marks decorate {ground}.", "where to start? {ground} offers six marks."),
)
EMPTY_NOTES = {  # by number of objects
    2: "Seven cells remain untouched.",
    3: "Six spaces hold nothing whatsoever.",
    4: "Five spots were left blank.",
    5: "Four squares of board stay free.",
    6: "Just three gaps are left between them.",
}
CLOSINGS = (  # by colour of the object told last
    "Overall the mood is warm, thanks to that final touch of fire.",
    "Taken together, it feels like late autumn afternoon.",
    "Altogether the effect reminds me of summer mornings.",
    "In sum, an impression of garden peace prevails.",
    "On balance, everything breathes a quiet evening air.",
    "The whole leaves some hint of magic behind.",
    "As a result, such an arrangement appears friendly, even tender.",
    "So finally, strong contrast dominates our composition.",
)

STORY = (  # by shape and row
    "a pilot named {n} steered his balloon over the {p0}",
    "{a} rolled into the {p1} and asked for tea",
    "deep in the cellar near the {p2}, {a} slept soundly",
    "{a} built a roof above the {p1} against rain",
    "inside the {p0} lived {a}, a patient baker",
    "{a} laid bricks along the {p0} all morning",
    "from the peak at {p3}, {a} watched eagles",
    "{a} pitched camp by the {p0} when darkness fell",
    "{a} dug for gold at the {p1}",
    "on windy days {a} danced above the {p2}",
    "a merchant sold {a} to travellers crossing {p3}",
    "pirates hid {a} beneath the {p0}",
    "{a} sent signals from the {p0} to every sailor",
    "children wished upon {a} that lit the {p1}",
    "{a} tumbled onto the {p2} meadow with a splash",
    "doctors raised {a} over their clinic at the {p1}",
    "{a} blocked {p3}, so nobody could pass",
    "an old map named {a} as treasure under the {p1}",
    "{a} crowned the king who ruled the {p2}",
    "jugglers threw {a} around {p3}, laughing loudly",
    "{a} was lost in mud at the {p0}, still glittering",
    "a poet pinned {a} high upon the {p2} wall",
    "{a} wrote letters from the {p0} to distant friends",
    "{a} kept watch at {p3} until dawn arrived",
)
STORY_JOINS = (  # by number of steps between one object and the next: near, far; and its size
    ("Soon after that,", "Meanwhile,"), ("Much later,", "Far away,"),
)
STORY_OPENINGS = ("Once upon a time, two wanderers met.", "Long ago there stood three houses.",
                  "Listen, this tale has four heroes.", "Five neighbours never agreed on anything.",
                  "Nobody remembers how those six adventures began.")
STORY_ENDINGS = (  # by colour of the last object
    "They lit a bonfire and sang.", "Pumpkin soup was served to everyone.",
    "Sunrise found them smiling again.", "Ever since, tall trees grow there.",
    "Then waves washed all footprints away.", "Only wizards know what happened next.",
    "It ended with flowers and a wedding.", "Night came, and nobody spoke another word.",
)

DRAW = (  # by shape and size: small, large
    ("use a compass to trace {a} in the {p0}", "swing your arm to sketch {a} within the {p1}"),
    ("rule short lines for {a} at {p3}", "measure equal sides and build {a} in the {p1}"),
    ("join three points into {a} beside the {p0}", "tilt two long edges so {a} fills the {p1}"),
    ("turn your paper slightly, then add {a} at the {p0}", "balance {a} upright towards the {p2}"),
    ("flick quick rays outward for {a} in the {p1}", "plan five points before placing {a} at {p3}"),
    ("stroke twice to make {a} on the {p0}", "block in thick bars forming {a} near the {p2}"),
    ("outline {a} lightly inside the {p1}", "leave a generous hole when painting {a} at the {p0}"),
    ("curve both lobes of {a} over {p3}", "dip to a sharp point finishing {a} in the {p1}"),
)
DRAW_STEPS = ("First,", "Next,", "Third,", "After that,", "Fifth,", "Last,")
DRAW_OPENINGS = (  # by ground
    "take a clean sheet and leave it white.", "cover a sheet with upright bands beforehand.",
    "sprinkle fine points over your sheet as preparation.",
    "prepare a chessboard pattern using pale grey.",
)
DRAW_PAINTS = (  # by colour of the last object
    "Keep the ripest tomato paint for the end.", "Mix yellow with some rust once you finish.",
    "A lemon pencil completes it.", "Clean any grassy stains off the brush.",
    "Rinse with water: ocean tones spread easily.", "Grape ink dries slowly, so wait.",
    "Blow softly until the rosy layer sets.", "Charcoal smudges, therefore wash your hands.",
)

LOCATE = (  # short sentences about one object, by colour and row
    "{a} can be pointed out in the {p0}", "{a} turns up along {p3}",
    "{a} is parked at the {p1}", "{a} dangles from the {p2}",
    "{a} keeps to the {p0}", "{a} warms the {p1}",
    "{a} beams at {p3}", "{a} stays put at the {p1}",
    "{a} gleams by the {p0}", "{a} climbs the {p2}",
    "{a} nestles within the {p1}", "{a} sprouts at {p3}",
    "{a} drifts near the {p0}", "{a} anchors {p3}",
    "{a} sinks towards the {p2}", "{a} reigns over the {p1}",
    "{a} lingers at the {p0}", "{a} dwells around the {p2}",
    "{a} blooms in the {p1}", "{a} blushes at {p3}",
    "{a} settles upon the {p0}", "{a} broods over {p3}",
    "{a} lurks by the {p1}", "{a} weighs down the {p2}",
)
COUNT_OPENINGS = (  # by count: for a shape, for a colour
    ("None. I searched everywhere without success.",
     "No such colour appears anywhere at all, I assure you."),
    ("Exactly one.", "A single object matches."),
    ("Two of them, as far as I see.", "That shade occurs twice."),
    ("Three, if my counting is right.", "I count three specimens."),
    ("Four altogether.", "Quadruple: four pieces wear it."),
    ("Five, quite a lot.", "Five share that paint."),
    ("Six, which means every object.", "All six, no exception."),
)
COUNT_RESTS = (  # by number of objects that do not match
    "Nothing else is present.", "One other thing remains:", "A further couple deserves mention:",
    "Three more do not qualify:", "The remaining four differ:", "Five unrelated pieces follow:",
    "Instead the picture contains half a dozen others:",
)
HUES = ("crimson", "tangerine", "golden", "leafy", "azure", "violet", "rosy", "ebony")
COLOUR_TALK = (  # what each colour feels like: small, large
    ("red speaks of courage", "red burns like passion"),
    ("orange tastes of fruit", "orange radiates comfort"),
    ("yellow giggles", "yellow pours out optimism"),
    ("green soothes our nerves", "green promises hope and growth"),
    ("blue whispers about rain", "blue opens an endless horizon"),
    ("purple adds a noble secret", "purple dreams of velvet curtains"),
    ("pink flatters shyly", "pink hugs whoever comes close"),
    ("black brings a pinch of grief", "black swallows light completely"),
)
VERDICTS = (  # by number of warm colours minus cold ones, from -2 or less to 2 or more
    "Thus a chilly, thoughtful feeling wins.", "Hence the temperature drops a bit.",
    "Warm and cold cancel out, so harmony results.", "Hence it leans to the warm side.",
    "Thus heat and energy clearly win.",
)
PLACE_OPENINGS = (  # by shape of what lies there
    "Some curved form: {a}.", "Four sides meet there: {a}.", "Three corners identify {a}.",
    "A slanted figure, namely {a}.", "Many spikes give away {a}.", "Crossed bars reveal {a}.",
    "A loop, to be precise {a}.", "Two lobes betray {a}.",
)
EMPTY_OPENINGS = ("Nothing is drawn up there.", "That spot between the others is vacant.",
                  "The ground alone is visible below.")
NEIGHBOUR_NOTES = (  # left, right, above, below: taken and free
    ("To its left waits {a}", "left of it the board is free"),
    ("its right side touches {a}", "towards the right comes a gap"),
    ("overhead appears {a}", "no roof covers it"),
    ("underneath we discover {a}", "there is no support below"),
)
EMPTY_BANK = (  # about a vacant place, by place
    "the {p0} is deserted", "silence rules the {p1}", "the {p2} was forgotten",
    "no paint reached the {p0}", "even the {p1} lacks content", "{p3} stays hollow",
    "the {p0} waits for visitors", "air fills the {p1}", "nobody claimed the {p2}",
)
SHAPE_FACTS = (
    "A circle has no corner, and all its points keep the same distance from the middle.",
    "A square owns four equal sides together with four right angles.",
    "A triangle gets by on three sides, and its angles add up to a straight line.",
    "A diamond is a leaning figure whose sides match while its angles alternate.",
    "A star alternates long tips and deep notches around one midpoint.",
    "A cross consists of two bars meeting at right angles.",
    "A ring is bounded by a pair of circles, the inner being empty.",
    "A heart joins two rounded lobes above a single pointed end.",
)
SHAPE_USES = (
    "Wheels, plates and clocks rely on it.", "Tiles, chessboards and boxes depend on it.",
    "Bridges, roofs and sails profit from it.", "Kites and playing cards display it.",
    "Flags, sheriffs and Christmas trees wear it.", "Ambulances and pharmacies paint it.",
    "Weddings, keys and planets are known for it.", "Lovers carve it into bark.",
)
COLOUR_FACTS = (
    "Red has the longest wavelength we can perceive.",
    "Orange sits halfway between red and yellow.",
    "Yellow is noticed first even in dim surroundings.",
    "Green fills forests because of chlorophyll.",
    "Blue light scatters most, hence our sky.", "Purple once cost more than silver.",
    "Pink is really a pale red.", "Black absorbs nearly every ray that arrives.",
)
COLOUR_USES = (
    "Stop signs and strawberries advertise it.", "Carrots, tigers and life jackets display it.",
    "Taxis, bananas and ducklings carry it.", "Frogs and traffic signals show it.",
    "Jeans, whales and glaciers have it.", "Lavender fields and bishops prefer it.",
    "Flamingos and bubble gum made it famous.", "Ravens, tyres and pianos own it.",
)
