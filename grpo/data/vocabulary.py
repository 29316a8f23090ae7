"""Words and phrases of generated prompts (`grpo.data.prompt_generator`)."""

WORDS = """
open closed welcome sale fresh today tomorrow tonight always never together hello goodbye thanks please sorry enjoy
relax hurry wait stop start finish begin enter leave return travel wander explore discover create imagine believe dream
hope trust love laugh smile sing dance play work rest sleep wake read write draw paint build repair clean cook bake
roast grill fry boil taste drink share give take bring carry hold push pull lift drop throw catch climb jump swim walk
run ride drive sail row fly land float sink dive search find lose keep save spend borrow lend buy sell trade earn win
learn teach study listen speak whisper shout answer ask think know remember forget choose change grow plant water
harvest gather protect respect recycle reuse
bread butter cheese honey sugar salt pepper garlic onion tomato potato carrot cabbage spinach lettuce cucumber pumpkin
mushroom bean rice noodle pasta soup salad sandwich burger pizza pancake waffle cookie brownie muffin cake pie tart
pudding jelly cream yogurt milk coffee tea cocoa juice lemonade soda cider apple pear peach plum cherry grape melon
lemon lime orange banana mango papaya coconut almond walnut peanut olive ginger vanilla cinnamon chocolate caramel
breakfast brunch lunch dinner supper snack dessert picnic barbecue
river lake ocean island beach harbour bay coast cliff valley canyon desert forest meadow prairie jungle swamp glacier
volcano mountain summit ridge hill cave waterfall stream pond garden orchard vineyard farm field barn stable mill
village town city street avenue alley square market plaza bridge tunnel tower castle palace temple church chapel
monastery museum gallery theatre cinema stadium arena library school college academy hospital clinic pharmacy bakery
butcher grocery florist barber tailor jeweller bookshop toyshop workshop factory warehouse office bank hotel hostel
motel cabin cottage cafe diner tavern kitchen cellar attic balcony terrace courtyard fountain statue lighthouse
station platform ticket express airport runway terminal gate ferry dock pier marina garage parking taxi bus
tram train subway bicycle scooter truck wagon carriage canoe kayak yacht rocket shuttle satellite planet galaxy comet
meteor eclipse orbit horizon sunrise sunset dawn dusk noon midnight morning afternoon evening night
spring summer autumn winter january february march april june july august september october november december monday
tuesday wednesday thursday friday saturday sunday week month year century
rain snow storm thunder lightning breeze wind fog mist frost ice cloud rainbow sunshine shadow flame ember smoke ash
stone marble granite copper silver gold bronze iron steel glass crystal diamond ruby emerald pearl amber velvet silk
cotton linen leather wool paper ink canvas clay timber bamboo
red green blue yellow purple violet indigo crimson scarlet ivory turquoise magenta maroon
lion tiger leopard panther wolf fox bear deer moose rabbit squirrel beaver otter badger hedgehog horse donkey goat
sheep cattle camel elephant giraffe zebra monkey gorilla panda koala kangaroo dolphin whale shark octopus turtle
lobster salmon trout eagle falcon hawk owl raven sparrow robin swallow heron pelican penguin flamingo peacock parrot
butterfly beetle spider cricket
rose tulip daisy lily orchid lotus jasmine lavender violin maple cedar willow birch pine oak elm
music melody rhythm harmony concert orchestra choir guitar piano trumpet drum flute cello opera ballet
festival carnival parade circus fair party wedding birthday holiday victory champion winner trophy medal record
football tennis hockey baseball rugby golf boxing chess puzzle marathon
captain sailor pilot driver doctor nurse teacher student artist painter writer poet singer dancer actor baker chef
farmer gardener hunter fisher miner mason carpenter plumber printer banker lawyer judge mayor queen king prince
princess knight wizard pirate giant ghost robot hero legend
history science nature energy power motion gravity magnet engine battery signal radio camera mirror window door ladder
hammer compass anchor lantern candle clock watch umbrella suitcase backpack pocket button ribbon basket bottle
kettle teapot spoon plate bowl blanket pillow carpet curtain chair table
quiet bright gentle brave clever honest patient simple sweet bitter spicy crispy golden ancient modern secret hidden
broken frozen distant narrow steep smooth rough sharp heavy lucky happy lonely hungry thirsty sleepy curious famous
public private free daily weekly special limited original natural organic handmade local royal grand mighty little
danger caution warning emergency exit entrance notice attention silence speed limit detour
north south east west left right upper lower inside outside forward backward
quality service discount bargain price cash credit budget profit value offer member reward bonus
""".split()

# name: phrase
SURFACES = {
    "neon sign": "a neon sign that says {text}",
    "wooden sign": "a wooden sign with {text} carved into it",
    "street sign": "a street sign that reads {text}",
    "shop sign": "a painted shop sign with the name {text}",
    "hanging sign": "a sign that hangs from an iron bracket and reads {text}",
    "billboard": "a billboard with {text} in large letters",
    "banner": "a cloth banner with the text {text}",
    "poster": "a poster with the headline {text}",
    "flag": "a flag with {text} printed on it",
    "chalkboard": "a chalkboard on which {text} is written",
    "whiteboard": "a whiteboard with {text} written in black marker",
    "paper note": "a paper note with {text} written by hand",
    "envelope": "an envelope addressed with {text}",
    "notebook": "an open notebook with {text} across the page",
    "book cover": "a book whose cover says {text}",
    "newspaper": "a newspaper with the headline {text}",
    "magazine": "a magazine titled {text}",
    "postcard": "a postcard that reads {text}",
    "ticket": "a printed ticket that shows {text}",
    "menu": "a menu titled {text}",
    "cardboard box": "a cardboard box stamped {text}",
    "wooden crate": "a wooden crate with {text} stencilled on its side",
    "label": "a glass bottle with the label {text}",
    "jar": "a jar of jam labelled {text}",
    "tin can": "a tin can with {text} on its wrapper",
    "mug": "a mug with {text} on its side",
    "paper cup": "a paper cup with {text} on its sleeve",
    "cake": "a cake with {text} written in icing",
    "cookie": "a large cookie decorated with {text}",
    "T-shirt": "a T-shirt printed with {text}",
    "cap": "a cap embroidered with {text}",
    "tote bag": "a tote bag that reads {text}",
    "shop window": "a shop window with {text} painted on the glass",
    "brick wall": "a brick wall with {text} sprayed across it",
    "metal plate": "a metal plate engraved with {text}",
    "stone tablet": "a stone tablet with {text} chiselled into it",
    "wax seal": "a letter closed with a seal that spells {text}",
    "computer screen": "a computer screen that displays {text}",
    "phone screen": "a phone whose screen shows {text}",
    "departure board": "a departure board that shows {text}",
    "cinema marquee": "a cinema marquee that announces {text}",
    "scoreboard": "a scoreboard that flashes {text}",
    "van": "a delivery van with {text} on its side",
    "boat": "a small boat with {text} painted on its bow",
    "balloon": "a balloon printed with {text}",
    "kite": "a kite with {text} on its sail",
    "sand": "wet sand with {text} drawn into it",
    "snow": "a field of snow with {text} trodden into it",
    "doormat": "a doormat that reads {text}",
    "license plate": "a car whose license plate reads {text}",
}
SCENES = {
    "rainy street": "on a rainy city street",
    "village square": "in a quiet village square",
    "cafe": "inside a small cafe",
    "mountain pass": "on a snowy mountain pass",
    "harbour": "at the edge of a harbour",
    "station": "in a railway station",
    "stone bridge": "beside an old stone bridge",
    "flower garden": "in a garden full of flowers",
    "window desk": "on a desk by a window",
    "alley": "in a narrow alley",
    "seaside": "on a windy seaside promenade",
    "library": "in a library with tall shelves",
    "forest": "in a forest clearing",
    "office": "in a bright office",
    "country road": "beside a country road",
    "market": "at a crowded market",
    "kitchen": "in a warm kitchen",
    "workshop": "in a dusty workshop",
    "beach": "on an empty beach",
    "desert": "in a wide desert",
    "rooftop": "on a rooftop above the city",
    "subway": "on a subway platform",
    "airport": "in an airport hall",
    "museum": "in a museum gallery",
    "stadium": "in a full stadium",
    "farm": "in front of a red barn",
    "vineyard": "between rows of vines",
    "lakeside": "on the shore of a calm lake",
    "tent": "at a camp by a fire",
    "fair": "at a summer fair",
    "toy shop": "in a toy shop",
    "classroom": "in an empty classroom",
    "hospital": "in a hospital corridor",
    "greenhouse": "inside a greenhouse",
    "bakery": "behind the counter of a bakery",
    "barber shop": "in a barber's shop",
    "garage": "in a car garage",
    "pier": "at the end of a wooden pier",
    "courtyard": "in a sunlit courtyard",
    "staircase": "at the foot of a marble staircase",
    "theatre": "on the stage of a theatre",
    "laboratory": "in a tidy laboratory",
    "attic": "in an attic full of boxes",
    "porch": "on the porch of a cottage",
    "park": "in a park with tall trees",
    "playground": "at the edge of a playground",
    "hillside": "on a green hillside",
    "waterfall": "near a waterfall",
    "snowy town": "in a small town under snow",
    "space station": "inside a space station",
}
LIGHTS = {
    "": "",
    "dawn": "at dawn",
    "noon": "in the bright light of noon",
    "golden hour": "in low golden light",
    "dusk": "at dusk",
    "night": "at night",
    "lamps": "under warm lamps",
    "fog": "in thin fog",
}
CAMERAS = {
    "static": "The camera stays still.",
    "push in": "The camera moves slowly closer.",
    "pull out": "The camera draws slowly back.",
    "pan left": "The camera pans to the left.",
    "pan right": "The camera pans to the right.",
    "tilt up": "The camera tilts up.",
    "tilt down": "The camera tilts down.",
    "orbit": "The camera circles around it.",
    "crane": "The camera rises from low to high.",
    "track": "The camera glides past from side to side.",
    "handheld": "The camera is held by hand and sways a little.",
    "zoom": "The camera zooms in on the letters.",
}
# sentences of long prompts (`grpo.data.prompt_styles.long`)
LETTERS = (
    "The letters are large, evenly spaced and easy to read, with crisp edges and a clear contrast to their ground.",
    "Each letter was made with care; the strokes are thick and even, and nothing covers them.",
    "The writing fills the middle of the picture, in plain upright letters that catch the light.",
    "The characters are a little worn at the edges, yet every one of them can be read from afar.",
    "The text stands out in a warm colour, set in one tidy line without any ornament around it.",
    "The lettering is neat and slightly raised, so that thin shadows follow the outline of every letter.",
)
SURROUNDINGS = (
    "Behind it the background blurs into soft shapes and muted colours.",
    "A few people walk past in the distance without looking up, and their shadows slide over the ground.",
    "Around it lie small everyday things that somebody has left there, slightly out of focus.",
    "The surface has fine scratches and specks of dust, which make it look used and real.",
    "To both sides the scene is calm and nearly empty, with long reflections on the floor.",
    "Old walls and a few plants frame the view, and a bicycle leans at the edge of the picture.",
)
MOVEMENTS = (
    "A light breeze moves everything that hangs loose, while the text itself keeps still.",
    "Tiny particles drift slowly through the air and glow where the light falls on them.",
    "Now and then a shadow passes over the scene, as if a cloud went by.",
    "Steam rises slowly at one side and dissolves in the air.",
    "In the background something turns slowly, steadily and without a sound.",
    "Drops of water run down and leave thin bright traces.",
)
LOOKS = (
    "Realistic film look, shallow depth of field, natural colours and fine grain.",
    "The picture is sharp and detailed, with balanced exposure and gentle contrast.",
    "It looks like a documentary filmed with a fifty millimetre lens, quiet and precise.",
    "Cinematic light with deep but open shadows and a restrained palette of three colours.",
    "Soft, even light without harsh reflections; the mood is friendly and unhurried.",
    "High resolution, steady focus on the text, smooth motion without flicker.",
)
