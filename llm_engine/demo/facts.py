"""What the demo model knows, as plain tables: one fact per entry, fields separated by colons.

Everything the model can say about the world starts here; `questions.py` puts it into words.
"""


def rows(table: str) -> list[list[str]]:
    """Split a table into rows; entries are separated by commas or line ends."""
    entries = table.replace("\n", ",").split(",")
    return [[field.strip() for field in e.split(":")] for e in entries if e.strip()]


def pairs(table: str) -> dict[str, str]:
    return {row[0]: row[1] for row in rows(table)}


# country : capital : continent : language
COUNTRIES = rows("""
France:Paris:Europe:French, Italy:Rome:Europe:Italian, Spain:Madrid:Europe:Spanish
Germany:Berlin:Europe:German, Portugal:Lisbon:Europe:Portuguese, Greece:Athens:Europe:Greek
Finland:Helsinki:Europe:Finnish, Sweden:Stockholm:Europe:Swedish, Norway:Oslo:Europe:Norwegian
Denmark:Copenhagen:Europe:Danish, Iceland:Reykjavik:Europe:Icelandic, Poland:Warsaw:Europe:Polish
Austria:Vienna:Europe:German, Hungary:Budapest:Europe:Hungarian, Ireland:Dublin:Europe:English
Romania:Bucharest:Europe:Romanian, Bulgaria:Sofia:Europe:Bulgarian, Croatia:Zagreb:Europe:Croatian
Serbia:Belgrade:Europe:Serbian, Slovenia:Ljubljana:Europe:Slovenian
Estonia:Tallinn:Europe:Estonian
Latvia:Riga:Europe:Latvian, Lithuania:Vilnius:Europe:Lithuanian, Ukraine:Kyiv:Europe:Ukrainian
Slovakia:Bratislava:Europe:Slovak, Albania:Tirana:Europe:Albanian, Malta:Valletta:Europe:Maltese
Russia:Moscow:Europe:Russian, the Netherlands:Amsterdam:Europe:Dutch
the United Kingdom:London:Europe:English, Turkey:Ankara:Asia:Turkish, Japan:Tokyo:Asia:Japanese
China:Beijing:Asia:Chinese, India:New Delhi:Asia:Hindi, Thailand:Bangkok:Asia:Thai
Vietnam:Hanoi:Asia:Vietnamese, Indonesia:Jakarta:Asia:Indonesian, Malaysia:Kuala Lumpur:Asia:Malay
the Philippines:Manila:Asia:Filipino, South Korea:Seoul:Asia:Korean
Mongolia:Ulaanbaatar:Asia:Mongolian
Nepal:Kathmandu:Asia:Nepali, Pakistan:Islamabad:Asia:Urdu, Bangladesh:Dhaka:Asia:Bengali
Iran:Tehran:Asia:Persian, Iraq:Baghdad:Asia:Arabic, Israel:Jerusalem:Asia:Hebrew
Jordan:Amman:Asia:Arabic, Lebanon:Beirut:Asia:Arabic, Saudi Arabia:Riyadh:Asia:Arabic
Qatar:Doha:Asia:Arabic, Armenia:Yerevan:Asia:Armenian, Georgia:Tbilisi:Asia:Georgian
Cambodia:Phnom Penh:Asia:Khmer, Laos:Vientiane:Asia:Lao, Egypt:Cairo:Africa:Arabic
Morocco:Rabat:Africa:Arabic, Algeria:Algiers:Africa:Arabic, Tunisia:Tunis:Africa:Arabic
Kenya:Nairobi:Africa:Swahili, Ethiopia:Addis Ababa:Africa:Amharic, Ghana:Accra:Africa:English
Nigeria:Abuja:Africa:English, Senegal:Dakar:Africa:French, Uganda:Kampala:Africa:English
Zambia:Lusaka:Africa:English, Zimbabwe:Harare:Africa:English, Angola:Luanda:Africa:Portuguese
Somalia:Mogadishu:Africa:Somali, Rwanda:Kigali:Africa:English, Namibia:Windhoek:Africa:English
the United States:Washington:North America:English, Canada:Ottawa:North America:English
Mexico:Mexico City:North America:Spanish, Cuba:Havana:North America:Spanish
Jamaica:Kingston:North America:English, Panama:Panama City:North America:Spanish
Brazil:Brasilia:South America:Portuguese, Argentina:Buenos Aires:South America:Spanish
Chile:Santiago:South America:Spanish, Peru:Lima:South America:Spanish
Colombia:Bogota:South America:Spanish, Ecuador:Quito:South America:Spanish
Uruguay:Montevideo:South America:Spanish, Venezuela:Caracas:South America:Spanish
Australia:Canberra:Oceania:English, New Zealand:Wellington:Oceania:English
Fiji:Suva:Oceania:English
""")

# Each pair is learned in both directions, so a word may appear only once.
OPPOSITES = pairs("""
hot:cold, big:small, tall:short, fast:slow, happy:sad, old:new, good:bad, light:dark, up:down
left:right
open:closed, full:empty, hard:soft, early:late, rich:poor, strong:weak, wet:dry, clean:dirty
near:far
day:night, loud:quiet, high:low, first:last, black:white, true:false, inside:outside, thick:thin
sweet:sour, wide:narrow, deep:shallow, sharp:blunt, smooth:rough, brave:afraid
begin:end, push:pull, buy:sell, win:lose, love:hate, come:go, give:take, laugh:cry, north:south
east:west, above:below, before:after, always:never, more:less, yes:no, on:off, front:back
top:bottom
friend:enemy, beautiful:ugly, cheap:expensive, easy:difficult, safe:dangerous
""")

COLOURS = pairs("""
a banana:yellow, a lemon:yellow, the sun:yellow, a daffodil:yellow, the sky:blue, the sea:blue
a blueberry:blue, grass:green, a leaf:green, a frog:green, a cucumber:green, broccoli:green
a pea:green
a lime:green, spinach:green, a tomato:red, a strawberry:red, a cherry:red, blood:red
a fire engine:red
a ladybird:red, a carrot:orange, an orange:orange, a pumpkin:orange, a goldfish:orange, snow:white
milk:white, salt:white, rice:white, a swan:white, a cloud:white, paper:white, coal:black
a crow:black
the night:black, a tyre:black, a panther:black, chocolate:brown, coffee:brown, wood:brown
soil:brown
a bear:brown, an elephant:grey, a mouse:grey, a stone:grey, a flamingo:pink, a pig:pink
a plum:purple
an aubergine:purple, lavender:purple
""")

# animal : plural : sound : young : legs : food : home
ANIMALS = rows("""
cat:cats:meow:kitten:four:fish and mice:houses, dog:dogs:woof:puppy:four:meat and bones:houses
cow:cows:moo:calf:four:grass:fields, sheep:sheep:baa:lamb:four:grass:fields
horse:horses:neigh:foal:four:hay and oats:stables, pig:pigs:oink:piglet:four:roots and corn:farms
duck:ducks:quack:duckling:two:water plants:ponds, hen:hens:cluck:chick:two:seeds and worms:farms
goat:goats:bleat:kid:four:leaves and grass:hills, lion:lions:roar:cub:four:meat:savannas
frog:frogs:croak:tadpole:four:flies:ponds, bee:bees:buzz:larva:six:nectar:hives
owl:owls:hoot:owlet:two:mice:forests, wolf:wolves:howl:pup:four:meat:forests
snake:snakes:hiss:snakelet:no:mice and eggs:deserts
mouse:mice:squeak:pinkie:four:cheese and seeds:burrows
elephant:elephants:trumpet:calf:four:leaves and bark:savannas
bear:bears:growl:cub:four:honey and fish:forests
donkey:donkeys:hee-haw:foal:four:hay:farms, goose:geese:honk:gosling:two:grass:lakes
swan:swans:trumpet:cygnet:two:water plants:lakes
rabbit:rabbits:squeak:kit:four:carrots and grass:burrows
turkey:turkeys:gobble:poult:two:seeds:farms, spider:spiders:nothing:spiderling:eight:flies:webs
""")

PLURALS = pairs("""
mouse:mice, child:children, foot:feet, tooth:teeth, goose:geese, man:men, woman:women, ox:oxen
person:people, leaf:leaves, knife:knives, wolf:wolves, life:lives, wife:wives, half:halves
sheep:sheep
fish:fish, deer:deer, city:cities, baby:babies, lady:ladies, party:parties, story:stories
country:countries
box:boxes, fox:foxes, bus:buses, class:classes, dish:dishes, church:churches, potato:potatoes
tomato:tomatoes, hero:heroes, cat:cats, dog:dogs, house:houses, car:cars, tree:trees, book:books
table:tables, apple:apples, boy:boys, day:days, key:keys, toy:toys, shelf:shelves, loaf:loaves
cherry:cherries, berry:berries, puppy:puppies, glass:glasses, watch:watches, cactus:cacti
""")

SPELLED = """cat dog house apple tree water bread green school table orange yellow friend summer
winter
flower happy music river garden paper window bottle chair pencil mother father sister brother horse
lemon planet rocket doctor castle market bridge forest island kitchen""".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November
December""".split()

# What one needs to answer "how many ...": thing -> number word.
AMOUNTS = pairs("""
days are in a week:7, months are in a year:12, hours are in a day:24, minutes are in an hour:60
seconds are in a minute:60, days are in a year:365, sides does a triangle have:3
sides does a square have:4, sides does a hexagon have:6, wheels does a car have:4
wheels does a bicycle have:2, fingers are on one hand:5, letters are in the alphabet:26
years are in a century:100, players are in a football team:11, strings does a violin have:4
seasons are in a year:4, eggs are in a dozen:12, planets are in the solar system:8
degrees are in a circle:360, centimetres are in a metre:100, grams are in a kilogram:1000
""")

CATEGORIES: dict[str, list[str]] = {
    "fruits": "apple, banana, cherry, lemon, mango, orange, peach, pear, plum, grape".split(", "),
    "vegetables": "carrot, potato, onion, cabbage, spinach, leek, pumpkin, pea".split(", "),
    "animals": "cat, dog, horse, lion, elephant, bear, rabbit, wolf, sheep, cow".split(", "),
    "birds": "owl, duck, swan, crow, eagle, robin, penguin, parrot".split(", "),
    "colours": "red, blue, green, yellow, orange, purple, pink, black, white, brown".split(", "),
    "countries": "France, Italy, Spain, Japan, Brazil, Canada, Egypt, India, Kenya".split(", "),
    "cities": "Paris, Rome, London, Tokyo, Cairo, Madrid, Berlin, Lima, Oslo".split(", "),
    "planets": "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune".split(", "),
    "languages": "French, English, Spanish, German, Arabic, Hindi, Chinese, Italian".split(", "),
    "drinks": "water, tea, coffee, milk, juice, lemonade, cocoa".split(", "),
    "sports": "football, tennis, swimming, running, cycling, skiing, hockey".split(", "),
    "flowers": "rose, tulip, daisy, lily, daffodil, lavender, sunflower".split(", "),
    "trees": "oak, pine, birch, maple, willow, beech, cedar".split(", "),
    "tools": "hammer, saw, drill, spanner, chisel, screwdriver, file".split(", "),
    "instruments": "piano, violin, guitar, flute, drum, trumpet, harp".split(", "),
    "clothes": "shirt, coat, hat, sock, scarf, jacket, skirt, glove".split(", "),
}

NAMES = """Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maria Nora Oscar Paula
Quinn Rosa Sam Tom Uma Victor Wendy Yusuf Zoe Alice Bob Carol Daniel Eve Frank Gina Hugo
Ivan Julia Karl Linda Mark Nina Otto Peter Rita Simon Tina Vera Walter Amir Bella Chen
Diego Elena Finn Hana Isaac Jonas Kofi Lars Mei Noah Olga Pedro Ravi Sofia Tara Aino
Mikko Priya Omar Liam Lucy Max Ruth""".split()

NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
