#!/usr/bin/python3
"""The stories ember learns from: a grammar, and a generator that needs only a seed.

A story is a pure function of (SEED, index): `story(index)` gives the same text on every machine
and every run, in any order. Every tenth index (0, 10, 20, ...) is held out: it is never trained
on and serves to measure the loss. The text of every rule below was written for this project.

Each story is about one child (a name), one animal and one thing, and its last two sentences
speak of all three again. No other name, animal or thing of the lists below occurs in it, which is
what check.py relies on.

Notation inside rules: [a|b|c] picks one (may nest, may be empty), {slot} puts in what the story
has chosen. Words in braces are bound once per story; {a:list} draws from a list anew.

  grammar.py N [FIRST]   print N stories, one a line
  grammar.py --stats N   words, lengths and duplicates over N stories
"""
import random
import re
import sys

SEED = "ember-1"
HELD_OUT_EVERY = 10
MOST_WORDS = 98  # aimed at: the shortest of several tries where none comes that short

GIRLS = """Mira Anna Nora Ella Tilda Greta Ida Lucy Molly Sara Hana Zoe Clara Emma Lena Mina Alma
Nina Ada Tess Maya Lily Rosa Elsa""".split()
BOYS = """Tom Ben Sam Max Leo Finn Otto Hugo Jack Oscar Peter Paul Noah Luke Theo Ravi Omar Nils
Emil Anton Felix Simon Jonas Karl""".split()

# Met often, and met seldom: the long tail teaches the model to copy a word rather than to know it.
ANIMALS = """fox hen owl cat dog duck goat frog mouse hare bear crow goose lamb mole otter badger
robin donkey pony pig sheep squirrel hedgehog rabbit swan toad turtle beaver deer wolf kitten
puppy sparrow snail cow""".split()
RARE_ANIMALS = """dragon penguin monkey zebra elephant giraffe panda whale lion tiger camel parrot
raven lizard dolphin seal walrus moose heron magpie stork turkey rooster calf foal weasel ferret
hamster tortoise crab beetle cricket peacock eagle falcon pigeon leopard lynx koala kangaroo llama
yak bison newt gecko pelican""".split()

TOYS = """kite ball drum doll boat puppet whistle flute fiddle hoop sled wagon marble balloon
trumpet puzzle""".split()
REACH = """rope ladder net broom umbrella spade rake oar scarf shawl cloak belt blanket paddle
pole""".split()
WEAR = "hat scarf coat cap shawl sweater blanket cloak vest quilt jacket cape hood".split()
TREASURE = """key ring bell coin shell button feather pearl map mirror clock book box crown
necklace locket compass ribbon pencil whistle marble lens medal""".split()
FOOD = """cake pie pear apple loaf cookie plum pumpkin pancake melon carrot bun muffin tart
peach sandwich""".split()
MUSIC = "drum flute fiddle whistle trumpet horn harp banjo".split()
MEND = """kite boat wagon sled drum doll clock umbrella puppet fiddle basket ladder lantern cart
chair flute hoop bucket swing""".split()
LIGHTS = "lantern candle torch lamp".split()
SOUNDS = "bell whistle drum trumpet horn".split()
RARE_TOYS = "robot train rocket tricycle scooter telescope teapot violin".split()
THINGS = sorted(set(TOYS + REACH + WEAR + TREASURE + FOOD + MUSIC + MEND + LIGHTS + SOUNDS
                    + RARE_TOYS))

LISTS = {
    "child_is": """kind|clever|brave|quiet|cheerful|curious|gentle|busy|shy|lively|patient|small
|careful|stubborn|dreamy|friendly|honest|bold|thoughtful|merry""",
    "animal_is": """little|young|old|hungry|grey|brown|tired|shy|clever|lonely|sleepy|thin|fat
|funny|gentle|white|black|wild|tiny|lame|polite|proud|spotted|curious""",
    "thing_is": """red|blue|green|yellow|golden|silver|tiny|big|round|old|new|shiny|white|plain
|purple|striped|lovely|heavy|strange|pink|orange|bright""",
    "food_is": """fresh|big|small|sweet|golden|warm|round|lovely|juicy|fine|tasty|large|ripe
|beautiful""",
    "home": """in a small house by the sea|at the edge of a forest|in a village between two hills
|on a farm near the river|in a tall house in the town|in a cottage at the foot of a mountain
|in a narrow street behind the market|on a quiet island|in an old mill|next to the school
|beside a wide lake|above the bakery|near the railway|at the end of a long road
|in a valley full of orchards|close to the harbour""",
    "walk": """the forest|the meadow|the river|the hill|the garden|the beach|the market|the bridge
|the orchard|the pond|the old mill|the field|the lake|the harbour|the barn|the park|the valley
|the well|the stream|the woods""",
    "hobby": """to paint|to sing|to climb trees|to count the clouds|to read|to bake bread
|to pick flowers|to swim|to dig holes|to draw|to tell jokes|to dance|to build towers
|to watch the stars|to plant seeds|to skip over puddles|to make up songs|to listen to the wind
|to run barefoot|to ask questions|to fish|to sew|to ride on carts""",
    "day": """Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday""",
    "time": """morning|afternoon|evening|day""",
    "season": "spring|summer|autumn|winter",
    "weather": """sunny|windy|rainy|cold|warm|cloudy|foggy|snowy|stormy|bright|grey|frosty|hot
|misty|fresh""",
    "nature": """the leaves were falling|the sky was clear|the birds were singing
|the grass was wet|the wind was strong|the snow lay deep|the sun was high
|clouds raced over the hills|the air smelled of rain|flowers stood everywhere
|the trees were bare|the roads were muddy|everything was quiet|ice covered the windows
|the corn was ripe|smoke rose from the chimneys""",
    "kin": """mother|father|grandmother|grandfather|sister|brother|aunt|uncle""",
    "elder": """grandmother|grandfather|aunt|uncle|the teacher|the baker|the miller|the doctor
|the shepherd|the blacksmith""",
    "person": """baker|miller|farmer|teacher|fisherman|gardener|tailor|shepherd|sailor|postman
|carpenter|shopkeeper|blacksmith|weaver|potter|doctor""",
    "under": """under a bush|behind a wall|in the tall grass|under a bench|beside the path
|between the roots of an oak|in a hollow tree|behind a barrel|on a mossy rock|under a pile of leaves
|near a wooden gate|at the bottom of the steps|in a dry ditch|behind the stable""",
    "trap": """in the mud|in a deep hole|on a thin branch|in a thorny hedge|on a rock in the river
|in a muddy ditch|on the roof of a shed|at the bottom of a dry well|on a narrow ledge
|behind a heavy gate|on a drifting log|between two stones""",
    "sad": "sad|worried|unhappy|upset|gloomy|miserable",
    "glad": "happy|glad|proud|cheerful|delighted|pleased|thankful",
    "scared": "afraid|frightened|scared",
    "softly": "softly|quietly|kindly|gently|in a low voice",
    "loudly": "loudly|proudly|happily|eagerly|cheerfully|suddenly",
    "long": """for an hour|all morning|until noon|the whole day|for a long time|until it grew dark
|for three days|all week|until supper""",
    "work": """washed the dishes|swept the floor|fed the fire|carried water
|chopped wood|pulled weeds|did the shopping|folded the washing|set the table|peeled potatoes
|fetched the milk|learned to spell""",
}
LISTS = {k: [w.replace("\n", "").strip() for w in v.split("|")] for k, v in LISTS.items()}

OPEN = [
    "[Once upon a time|Once upon a time|Once upon a time|Long ago|Many years ago|Once|In the old "
    "days], [there was|there lived] a {child_is} {child} [named|called] {N}[| who lived {home}"
    "| who loved {hobby}].",
    "[Once upon a time|Once upon a time|Once], a {child_is} {child} [named|called] {N} lived "
    "{home}[| with {his} {kin}].",
    "There [once was|was once] a {child} called {N}[, who was {child_is} and {child_is2}| who lived "
    "{home}| who liked {hobby}].",
    "{N} was a {child_is} {child} who [lived {home}|loved {hobby}].",
    "{N} lived {home}[| with {his} {kin}| with {his} {kin} and {his} {kin2}].",
    "Far away, {home}, [lived|there lived] a {child_is} {child} named {N}.",
    "[One|On a] {weather} {time}[ in {season}|], {N} [went out to {walk}|was on {his} way to "
    "{walk}|came home from {walk}|sat by the window|looked out of the door].",
    "It was a {weather} {time}[ in {season}|], and {nature}. [A {child_is} {child} named {N} "
    "walked to {walk}|{N}, a {child_is} {child}, stood at the door].",
    "[This is the story of|Let me tell you about] {N}, a {child_is} {child} who lived {home}.",
    "Everyone {near} knew {N}, [the {child_is} {child} who loved {hobby}|a {child_is} {child} with "
    "[dark|curly|red|long] hair].",
]
COLOUR = [
    "{He} [liked|loved|always wanted] {hobby}[| more than anything else].",
    "{He} was {child_is2}, and {he} was never [rude|lazy|cruel|in a hurry].",
    "Every {day}, {he} {work}[ for {his} {kin}|].",
    "It was a {weather} {time}, and {nature}.",
    "[That {time}|That {season}], {nature}.",
    "{His} {kin} often said, \"[Be careful|Be kind|Come home early|Keep your eyes open].\"",
    "When {he} had {work}, {he} was free to play.",
]

# What each plot may end on.
MORALS = {
    "lost": "Two find more than one|Those who look will find|A friend is worth more than a treasure"
            "|Never give up too soon",
    "stuck": "Small friends can be a great help|It is good to be ready|Being brave does not mean being "
             "loud|Never give up too soon",
    "gift": "A gift warms twice|Patience pays in the end|It is good to make things yourself|Kind hands "
            "are never idle",
    "quarrel": "It is never too late to say sorry|It is good to share|A friend is worth more than a "
               "treasure|Angry words help nobody",
    "fog": "Being brave does not mean being loud|Never walk alone in the dark|Two can do more than one"
           "|It is good to stay together",
    "mend": "Patience pays in the end|Two can do more than one|What is broken can be mended|Never give "
            "up too soon",
    "thief": "You must ask before you take|Kind words work better than shouting|It is good to share"
             "|It is never too late to say sorry",
    "errand": "A long road is short with a friend|A promise is a promise|Two walk better than one"
              "|It is good to ask the way",
    "fair": "Two can do more than one|The work was the best part|It is good to share|Patience pays in "
            "the end",
    "owner": "It is good to be honest|You cannot keep what is not yours|A friend is worth more than a "
             "treasure|What is lost wants to go home",
    "music": "Patience pays in the end|You must listen before you play|Nobody begins as a master"
             "|Songs are made to be shared",
    "hungry": "Those who help are helped in turn|It is good to share|Kindness comes back|Nobody is too "
              "small to help",
    "shy": "Some friends need time|Patience pays in the end|Being quiet is not being rude|It is good to "
           "share",
    "magic": "The best wish is for a friend|Nobody should be alone|A friend is worth more than a treasure"
             "|You must think before you wish",
    "flood": "Two can do more than one|Nobody is too small to help|It is good to stay together|Being "
             "brave does not mean being loud",
}

# A plot: which things suit it, then its sentences in order. A tuple (chance, rule) may be left out.
PLOTS = {}
PLOTS["lost"] = (TOYS + TREASURE + WEAR + RARE_TOYS, [
    "{He} had a {thing_is} {T}[, a present from {his} {kin}| that {he} took everywhere| that {his} "
    "{kin} had made].",
    "[But one {time}|One {day}|Then one {weather} {time}], the {T} was [gone|lost|nowhere to be "
    "found].",
    (0.5, "[{He} looked in every corner|{He} searched the house {long}|{N} looked under the bed and "
         "behind the door|{He} asked the {person}, but nobody had seen it]."),
    (.3, "{He} was so {sad} that {he} [could not eat|began to cry|sat down on the steps]."),
    "[Then|At last|Just then] {met} came by. \"[What is the matter|Why are you so {sad}|What "
    "have you lost]?\" [asked|said] the {A}.",
    "\"[I have lost my {T}|My {T} is gone|I cannot find my {T}],\" [said|answered|whispered] {N}.",
    (.3, "\"[I will help you|Let us look together|Do not cry|I have a good nose],\" said the {A}."),
    "[They went to {walk} and looked|The {A} ran ahead to {walk} and searched|Together they walked "
    "to {walk} and looked], and there, {under}, [lay|was] the {T}.",
    "{N} [laughed|jumped for joy|clapped {his} hands] and [hugged|thanked|kissed] the {A}.",
])
PLOTS["stuck"] = (REACH, [
    "[One {weather} {time}|One {day}|One {time} in {season}] {he} [went to|walked to|crossed|came "
    "past] {walk} with a {thing_is} {T} [over {his} shoulder|under {his} arm|for {his} {kin}].",
    "[There|On the way|Suddenly] {he} heard a [cry|voice|strange noise|sigh]. {A_cap} was "
    "stuck {trap}.",
    "\"[Help|Help me|Please help me]!\" [cried|called] the {A}. \"[I cannot get out|I have been "
    "here {long}|I am so {scared}].\"",
    (.3, "{N} [was {scared} too|looked around, but nobody was near|thought for a moment]."),
    (.3, "First {he} [pulled with both hands|called for {his} {kin}|tried to climb], but it did not "
         "[help|work]."),
    "Then {he} [held out|reached out|stretched out] the {T}. \"[Hold on|Take the other end|Hold "
    "tight|Do not let go]!\" [said|called|shouted] {N}.",
    "The {A} [held|grabbed|took] the {T}, and {N} pulled [and pulled|with all {his} strength|as hard "
    "as {he} could].",
    "[At last|Slowly|With a jump] the {A} [was free|came out|stood on firm ground], [dirty but "
    "safe|wet but safe|tired but {glad}].",
])
PLOTS["gift"] = (WEAR, [
    "[That|One] {season}, {he} [often met|made friends with|often saw] {met} [near {walk}|by "
    "{walk}|not far from {walk}].",
    "[When the nights grew cold|When the first snow fell|When the frost came], the {A} [shivered|"
    "was cold|trembled in the wind].",
    (0.5, "\"[You need something warm|You must not freeze|I will make you something],\" said {N}[| "
         "{softly}]."),
    "{He} asked {his} {kin} for [wool|some cloth|needle and thread], and {he} [worked|sewed|sat by "
    "the fire and worked] {long}.",
    (.3, "[It was not easy|Twice the thread broke|{His} fingers hurt|The first one was too small], "
         "but {he} did not give up."),
    "[At last|In the end|On {day}] a {thing_is} {T} was ready.",
    "{N} [carried|took|brought] the {T} to the {A}. \"[Is it for me|Is this really mine|What is "
    "that]?\" asked the {A}.",
    "\"[Yes, it is yours|It is a present|It is for you],\" said {N}[ with a smile|].",
    "The {A} put on the {T} and [danced in the snow|turned around three times|was warm at once].",
])
PLOTS["quarrel"] = (TOYS + TREASURE + FOOD, [
    "{His} best friend was {met}.",
    "[One {weather} {time}|One {day}], [they found|the two friends found] a {thing_is} {T} {under}.",
    "\"[It is mine|I saw it first|That is for me]!\" [cried|shouted|said] {N}. \"No, [it is mine|I "
    "saw it first|I found it]!\" [cried|shouted|said] the {A}.",
    "[They pulled and pushed|They argued {long}|They shouted at each other], and [then they went "
    "home without a word|soon both were angry|in the end both were in tears].",
    (0.5, "[That night|The next {time}|Later], {N} [could not sleep|felt {sad}|had no one to play with]."),
    (.3, "\"[What good is a {T} without a friend|Why did I shout|Is a {T} worth it]?\" {he} thought."),
    "{He} [went|ran|walked] to the {A} and said, \"[I am sorry|Forgive me|I was wrong]. [You may "
    "have the {T}|Let us share the {T}|The {T} is for both of us].\"",
    "\"[I am sorry too|I was wrong as well|I missed you],\" said the {A}.",
])
PLOTS["fog"] = (LIGHTS + SOUNDS, [
    "[One {weather} {time}|One {day}|One {time} in {season}] {he} [set out for|went to|walked to] "
    "{walk} with {his} friend, {met}.",
    "{N} [carried|had brought|held] a {thing_is} {T}[| that belonged to {his} {kin}].",
    "[Soon a thick fog came|Suddenly it grew dark|A storm came over the hills|They walked too "
    "far], and they [lost the path|did not know the way|could not see the road].",
    "\"[Are we lost?|How will we get home?|I am so {scared}!|Which way is home?]\" [asked|whispered|"
    "said] the {A}.",
    "\"[Stay close to me|Do not be {scared}|I have an idea|Give me your paw],\" [said|answered] "
    "{N}.",
    "{He} {used} the {T}[ and waited| three times|].",
    "[After a while|At last|Soon] {signal}.",
    "It was {his} {kin}, who had [been looking for them|come to meet them|followed the {T}].",
    (.3, "At home there was [hot soup|warm milk|fresh bread|sweet tea] for both."),
])
PLOTS["mend"] = (MEND, [
    "{He} had a {thing_is} {T}[, and {he} was very careful with it| that had belonged to {his} "
    "{kin}|].",
    "[But one {time}|One {day}|On a {weather} {time}] the {T} [broke|fell down and broke|was broken].",
    "{N} [was {sad}|cried|sat beside it and sighed]. \"[Who can mend it?|What shall I do now?|It will "
    "never be whole again!]\" {he} [said|asked|whispered].",
    "{Met_cap} [looked over the fence|heard it|stopped at the gate]. \"[I know how|Let me try|We can "
    "mend it],\" said the {A}.",
    "The {A} [brought|fetched|found] [glue|some string|a few nails|a piece of wood|a bit of wire], "
    "and {N} [held the pieces|fetched a hammer|read the instructions].",
    (0.6, "They worked {long}[, and they sang while they worked| without a break|]."),
    (.3, "[Once|Twice] it [came apart|fell over] again, but they [laughed and went on|did not give "
         "up|started again]."),
    "[At last|In the end|Before supper] the {T} was [as good as new|whole again|better than before].",
])
PLOTS["thief"] = (WEAR + TOYS + FOOD + TREASURE, [
    "[One {time}|One {day}] {he} [left|put|forgot] a {thing_is} {T} [on the steps|by the window|on "
    "the garden wall|on a bench].",
    "[When {he} came back|An hour later|In the evening], the {T} was gone, and [there were small "
    "tracks in the mud|the gate stood open|something rustled in the hedge].",
    "{N} followed [the tracks|the noise|a narrow path] to {walk}. There sat {met} with the {T}.",
    "\"[That is my {T}|Give it back|You took my {T}]!\" [cried|said|called] {N}.",
    "The {A} [hung its head|turned red|looked at the ground]. \"[I am sorry|Forgive me|I know],\" it "
    "said. \"{why}.\"",
    (0.4, "{N} [was not angry any more|thought about this|sat down beside it|had to smile]."),
    "\"[Next time, just ask|You only had to ask|Then let us share it|You should have asked],\" {he} "
    "[said|answered][| {softly}].",
])
PLOTS["errand"] = (FOOD + WEAR + ["book", "clock", "bell", "lamp", "map", "box", "basket"], [
    "[One {time}|One {day}] {his} {kin} said, \"[Please take|Take|I want you to bring|You may carry] "
    "this {thing_is} {T} to {elder_you}.\"",
    (0.3, "[The way was long|It was a long way over the hill|The road went past {walk}|{N} had never gone "
         "so far alone], and [{nature}|soon {he} was tired|{he} did not know every turn]."),
    "Near {walk} {he} met {met}. \"[Where are you going|What are you carrying|Are you lost]?\" asked "
    "the {A}.",
    "\"I am [taking|bringing|carrying] a {T} to {elder_my},\" [said|answered] {N}.",
    "\"[I know a short way|Follow me|I will come with you|Then you must cross the stream],\" said "
    "the {A}.",
    (0.4, "[The {A} went first|They walked side by side|They told each other stories], and {N} held the "
         "{T} [tightly|with both hands|dry and safe]."),
    (.3, "[When it began to rain|When a cold wind came|When they were tired], they [rested under a "
         "tree|hid in a barn|walked faster]."),
    "[Before dark|At noon|At last] they [stood at the door|arrived|knocked at the door].",
    "\"[What a fine {T}|What a lovely {T}|Thank you both],\" [they heard|came the answer]. \"[Come "
    "in|Sit down|Stay for supper].\"",
])
PLOTS["fair"] = (FOOD + TOYS + RARE_TOYS, [
    "[Every {season}|Once a year] there was a [fair|contest|feast] in the [village|town], and the "
    "best {T} won a prize.",
    "{N} [wanted to win|dreamed of the prize|wanted to take part], but {his} {T} was too [plain|small|"
    "crooked].",
    "\"[May I help|Shall I help you|Can I tell you a secret]?\" asked {met}[ one {time}|].",
    "[So they worked|The two of them worked|{N} and the {A} worked] {long}, and the {A} [knew many "
    "tricks|gave good advice|never got tired].",
    "[When the great day came|On {day}|At the fair], everyone [looked at|admired|pointed at] the "
    "{thing_is} {T}.",
    "\"[Who made it|Is it really yours|How did you do that]?\" asked the {person}.",
    "\"[We did it together|The {A} helped me|I did not do it alone],\" said {N}[| {loudly}].",
    (0.5, "[They won first prize|They came second|They did not win, but they were {glad}|The {person} "
         "shook their hands]."),
])
PLOTS["owner"] = (TREASURE + WEAR, [
    "[One {time}|One {day}|One {weather} {time}] {he} found a {thing_is} {T} {under}.",
    "\"[How lovely!|Whose is it?|Can I keep it?]\" {he} [thought|said|wondered]. {He} [put it in "
    "{his} pocket|took it home|showed it to {his} {kin}].",
    (0.4, "\"[Someone will miss it|You must find the owner|It belongs to somebody],\" said {his} {kin}."),
    "So {N} [asked the {person}|knocked at every door|went from house to house], but [it was not "
    "theirs|nobody knew it|everyone shook their head].",
    "Near {walk} {he} [heard someone crying|saw someone searching]. It was {met}.",
    "\"[I have lost my {T}!|My {T} is gone!|Have you seen a {T}?]\" said the {A}.",
    "{N} [would have liked to keep it|swallowed hard|did not think twice], but {he} [held out|gave "
    "back|handed over] the {T}. \"[Here it is|This must be yours|I found it for you],\" {he} said.",
    (0.4, "\"[You are honest|Thank you|I will never forget this],\" [said|cried] the {A}."),
])
PLOTS["music"] = (MUSIC, [
    "{He} had [found|bought|been given] a {thing_is} {T}, but {he} [could not play it|did not know "
    "any songs|played every note wrong].",
    (0.5, "[{His} {kin} went out|The {person} closed the window|Even the wind seemed to run "
         "away] when {N} practised."),
    "[One {time}|One {day}], {he} took the {T} to {walk}, where [nobody would hear|it was quiet].",
    "But {met} was [listening|sitting there]. \"[Not so fast|Count to four|Listen to the rain "
    "first],\" said the {A}.",
    (.4, "\"[Can you play|Will you teach me|Do you know music]?\" asked {N}. \"[I can hum|I can show "
         "you|I know one song],\" [said|answered] the {A}."),
    "[And it began to hum|So it tapped its foot|Then it closed its eyes and sang].",
    "They [practised|played] {long}, and [every day it sounded better|slowly the notes came "
    "right|{N} made fewer mistakes].",
    "[On {day}|Soon|At the next feast] {N} played the {T} [in front of everybody|for {his} {kin}|in "
    "the square], and [people danced|nobody went home|everyone clapped].",
])
PLOTS["hungry"] = (FOOD, [
    "[One {time}|One {day}|On a {weather} {time}] {his} {kin} gave {him} a {thing_is} {T} for the way.",
    "Near {walk} {he} sat down to eat. {Met_cap} came [closer|near|out of the grass] and looked at the "
    "{T}.",
    (.3, "\"[Are you hungry|Would you like some|Have you had breakfast]?\" asked {N}. \"[I have not "
         "eaten since {day}|Very|I could eat a mountain],\" [said|whispered|answered] the {A}."),
    "{N} [broke|cut|divided] the {T} in two, and [they ate together|gave the bigger half away|each "
    "had a piece].",
    "[A week later|The next {day}|Not long after], {N} [lost the way|slipped and hurt {his} foot|was "
    "caught in the rain] [near|behind|beyond] {walk}.",
    "[Who came running|Who found {him}|Who heard {him} call]? It was the {A}! \"[You shared with "
    "me|I have not forgotten|Now it is my turn],\" it said.",
    "The {A} [led {him} home|showed {him} the way|stayed until help came].",
])
PLOTS["shy"] = (TOYS + FOOD + MUSIC + LIGHTS, [
    "[Near|Behind|Beside] {walk} lived {met} that [hid from everyone|spoke to nobody|was {scared} of "
    "people].",
    "{N} wanted to be its friend. [So {he} sat down and waited|Every {time} {he} said hello|{He} "
    "tried a song], but the {A} [ran away|stayed in the shade|did not answer].",
    "[One {day}|The next {time}|Then] {he} brought a {thing_is} {T} and [put it on the grass|set it on "
    "a stump|laid it on the path].",
    "[For a while nothing happened|The leaves moved|Two eyes shone in the dark]. Then the {A} came "
    "out to [look at|sniff at|touch] the {T}.",
    "\"[What is that|Is that a {T}|What does it do]?\" it asked[| {softly}].",
    "\"It is [my|a] {T}. [Come and see|You may try it|We can share it],\" said {N}.",
    (0.5, "[They sat together {long}|The {A} came a step closer, and then another|That {time} they talked "
         "and laughed]."),
    (.3, "\"[I thought you were loud|I was so {scared}|Nobody ever asked me],\" said the {A}."),
])
PLOTS["magic"] = (TREASURE + LIGHTS + ["hat", "cloak", "drum", "flute", "umbrella"], [
    "[In the attic|In an old chest|At the market|In the cellar] {he} [found|bought|saw] a {thing_is} "
    "{T}[| covered with dust].",
    "[When {he} touched it|As soon as {he} picked it up|That night], the {T} [began to glow|began to "
    "hum|grew warm], and {met} stood [in the room|at the window|beside the bed].",
    "\"[You have one wish|I come with the {T}|You called me],\" said the {A}. \"[What do you want?|"
    "What shall it be?|Choose well.]\"",
    (0.5, "{N} thought of [gold|sweets|a castle|a long journey|flying]. But then {he} [looked at the {A}|"
         "thought of {his} {kin}|remembered something]."),
    "\"[What do you wish for|Are you not lonely|Would you like to be free]?\" {he} asked.",
    "\"[Nobody has asked me that before|I wish for a friend|I would like to see {walk}],\" [said|"
    "whispered] the {A}.",
    "\"Then [that is my wish|I wish the same|let us go there together],\" said {N}, and the {T} [shone "
    "like a star|rang once|turned cold and still].",
])
PLOTS["flood"] = (["boat", "bucket", "rope", "basket", "ladder", "umbrella", "blanket", "lantern",
                   "spade", "broom", "bell", "drum"], [
    "[One {season}|That {season}] it rained {long}, and the [river|lake|stream] [rose|grew] higher "
    "every hour.",
    "{Met_cap} came [to the door|running|out of the storm]. \"[My house is under water|The bridge is "
    "broken|I have nowhere to go]!\" [cried|said] the {A}.",
    "\"[Come in|You are safe here|We must be quick],\" said {N}. {He} took a {thing_is} {T} [from the "
    "wall|from the shed|out of the cellar].",
    "With the {T} they [helped the {person}|worked at the dam|went from house to house] {long}.",
    (.3, "The {A} [never stopped|did not complain|knew every path], and {N} [was not {scared}|forgot "
         "{his} cold feet|held the {T} with both hands]."),
    "[By morning|At last|In the end] the [rain stopped|water sank], and [the sun came out|everyone "
    "was safe|a rainbow stood over the hills].",
    (0.3, "\"[You were brave|We did it|Well done],\" [said|cried] the {person}."),
])

END = [
    "[From that day on|After that|From then on|Ever since], {N} and the {A} [were the best of friends|"
    "were always together|met every {time}], and the {T} [reminded them of that day|hung above the "
    "door|was never forgotten|stayed with them].",
    "[That evening|That night|Before bed], {N} told {his} {kin} about the {A} and the {T}[, and they "
    "all laughed| until {he} fell asleep|].",
    "And [so|that is how] {N}, the {A} and the {T} [became known in the whole village|came home "
    "together|were never apart again].",
    "{N} [smiled|was {glad}|was very {glad}], the {A} was {glad} too, and the {T} [lay between "
    "them|shone in the sun|was safe].",
    "[From that day on|After that|To this day], the {A} [came to visit|sat by the window|waited at the "
    "gate] every {day}, and {N} [always had the {T} ready|brought the {T} along|showed the {T} to "
    "everyone].",
    "\"{moral},\" said {N}. The {A} [nodded|agreed|smiled] and looked at the {T}.",
    "\"{moral},\" said the {A}. {N} [nodded|agreed|smiled] and [looked at|thought of] the {T}.",
    "{N} never forgot the {A}, and the {A} never forgot the {T}.",
    "[When {N} was old, {he}|Years later, {N}] still [spoke|told stories] of the {A} and the {T}.",
    "[And if you walk past|If you go to] {walk}, you may still see {N} and the {A} with the {T}.",
]
# Where the thing is food it may be eaten by now.
END_FOOD = [
    "[From that day on|After that|From then on|Ever since], {N} and the {A} [were the best of friends|"
    "met every {time}|ate together every {day}], and [neither of them forgot the {T}|they often spoke "
    "of the {T}|they laughed when they saw a {T}].",
    "[That evening|That night|Before bed], {N} told {his} {kin} about the {A} and the {T}[, and they "
    "all laughed| until {he} fell asleep|].",
    "\"{moral},\" said {N}. The {A} [nodded|agreed|smiled] and thought of the {T}.",
    "\"{moral},\" said the {A}. {N} [nodded|agreed|smiled] and thought of the {T}.",
    "{N} never forgot the {A}, and the {A} never forgot the {T}.",
    "[When {N} was old, {he}|Years later, {N}] still [spoke|told stories] of the {A} and the {T}.",
]
TAIL = [
    "The end.", "And that was the best day of the year{for_all}.",
]

ASK = [
    "Tell me a story about {what}", "tell me a story about {what}", "Tell a story about {what}",
    "Write a story about {what}", "A story about {what}", "Please tell me about {what}",
    "Tell me about {what}", "write a short story about {what}", "I want a story about {what}",
]


def _choose(rng, text):
    """Resolves the innermost [a|b] first, until none is left."""
    while True:
        end = text.find("]")
        if end < 0:
            return text
        start = text.rfind("[", 0, end)
        text = text[:start] + rng.choice(text[start + 1:end].split("|")) + text[end + 1:]


def _fill(rng, bound, text):
    text = _choose(rng, text)

    def slot(match):
        key = match.group(1)
        if key in bound:
            return bound[key]
        return rng.choice(LISTS[key])
    while "{" in text:
        text = _choose(rng, re.sub(r"\{(\w+)\}", slot, text))
    return text


def _tidy(text):
    text = re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", text)
    text = re.sub(r"  +", " ", text).strip()
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)


def _invented_name(rng):
    """A name no list holds, so that the model learns to copy what it has never met."""
    head = rng.choice("B D F G H J K L M N P R S T V W Z Br Fr Gr Tr St Sh Ch Al El Or Is".split())
    middle = rng.choice("a e i o u a e i o ai ee".split())
    tail = rng.choice("la ra na ma ny lo rin bert dor mus fi ssa lie ton vi ke da x ck lly ".split(" "))
    return head + middle + tail if len(head + middle + tail) > 2 else head + middle + "n"


def _noise(rng):
    """A line that asks for nothing we know: whatever stands before a story, a story follows."""
    kind = rng.random()
    if kind < .5:
        words = " ".join(rng.choice(rng.choice(list(LISTS.values()))) for _ in range(4)).split()
        words += ["what", "is", "the", "how", "hello", "hi", "why", "do", "you", "please", "I", "can"]
        rng.shuffle(words)
        line = " ".join(words[:rng.randint(1, 9)])
    elif kind < .8:
        line = " ".join("".join(rng.choice("etaoinshrdlucmfwypvbgkjqxz") for _ in
                                range(rng.randint(1, 9))) for _ in range(rng.randint(1, 6)))
    else:
        line = "".join(chr(rng.randint(33, 126)) if rng.random() < .8 else " " for _ in
                       range(rng.randint(1, 20))).strip()
    if rng.random() < .5:
        line = line[:1].upper() + line[1:]
    return line + rng.choice(["", "", ".", "?", "!", ":"])


def story(index, seed=SEED):
    """Returns (prompt, text, facts). The prompt may be empty; the text begins with a newline where
    a prompt precedes it. facts: name, animal, thing, plot, and `given`, how many characters of the
    text are not to be learned (the first mention of an invented name)."""
    rng = random.Random(f"{seed}/{index}")
    girl = rng.random() < .5
    name = rng.choice(GIRLS if girl else BOYS)
    invented = rng.random() < .08
    if invented:
        name = _invented_name(rng)
    animal = rng.choice(ANIMALS if rng.random() < .85 else RARE_ANIMALS)
    plot = rng.choice(list(PLOTS))
    things, sentences = PLOTS[plot]
    thing = rng.choice(things)
    if thing in RARE_TOYS and rng.random() < .5:
        thing = rng.choice(things)
    child_is, child_is2 = rng.sample(LISTS["child_is"], 2)
    kin, kin2 = rng.sample(LISTS["kin"], 2)
    elder = rng.choice([e for e in LISTS["elder"] if e not in (kin, kin2)])
    home = rng.choice(LISTS["home"])
    animal_is = rng.choice(LISTS["animal_is"])
    met = _choose(rng, f"[a {animal_is} {animal}|a {animal_is} {animal}|a {animal}|{animal_is} "
                       f"{animal}]")
    if not met.startswith("a "):
        met = "a " + met
    bound = {
        "N": name, "A": animal, "T": thing, "child": "girl" if girl else "boy",
        "he": "she" if girl else "he", "He": "She" if girl else "He",
        "his": "her" if girl else "his", "His": "Her" if girl else "His",
        "him": "her" if girl else "him",
        "child_is": child_is, "child_is2": child_is2, "kin": kin, "kin2": kin2,
        "elder_you": elder if elder.startswith("the ") else "your " + elder,
        "elder_my": elder if elder.startswith("the ") else "my " + elder,
        "home": home, "near": home, "met": met, "Met_cap": "A" + met[1:],
        "A_cap": "A" + met[1:], "thing_is": rng.choice(LISTS["food_is" if thing in FOOD else "thing_is"]),
        "person": rng.choice(LISTS["person"]), "season": rng.choice(LISTS["season"]),
        "hobby": rng.choice(LISTS["hobby"]), "weather": rng.choice(LISTS["weather"]),
        "walk": rng.choice(LISTS["walk"]), "moral": rng.choice(MORALS[plot].split("|")),
        "for_all": rng.choice(["", " for all of them"]),
    }
    if thing in LIGHTS:
        bound["used"] = "lit"
        bound["signal"] = _choose(rng, "[someone saw the light|a voice called their names|another light "
                                       "came closer|they heard steps]")
    else:
        bound["used"] = {"bell": "rang", "drum": "beat"}.get(thing, "blew")
        bound["signal"] = _choose(rng, "[someone heard the sound|a voice answered|they heard steps|a "
                                       "light came closer]")
    bound["why"] = _choose(rng, "[I was cold and had nothing|I have never had a " + thing + "|My little "
                                "ones are ill|I only wanted to look at it|I wanted someone to follow me|"
                                "Nobody ever gives me anything]")

    text = None
    for _ in range(8):
        opening = rng.choice(OPEN)
        parts = [_fill(rng, bound, opening)]
        if rng.random() < .25:
            parts.append(_fill(rng, bound, rng.choice([
                rule for rule in COLOUR if not
                ("{hobby}" in opening and "{hobby}" in rule or
                 "{weather}" in opening and "{nature}" in rule)])))
        for sentence in sentences:
            if isinstance(sentence, tuple):
                if rng.random() >= sentence[0]:
                    continue
                sentence = sentence[1]
            parts.append(_fill(rng, bound, sentence))
        parts.append(_fill(rng, bound, rng.choice(END_FOOD if thing in FOOD else END)))
        if rng.random() < .1:
            parts.append(_fill(rng, bound, rng.choice(TAIL)))
        attempt = _tidy(" ".join(parts))
        if text is None or len(attempt) < len(text):
            text = attempt
        if len(text.split()) <= MOST_WORDS:
            break

    prompt = ""
    roll = rng.random()
    if roll < .14 or (invented and roll < .4):
        what = rng.choice([f"a {animal}", f"a {animal}", f"{name}", f"a {thing}",
                           f"{name} and a {animal}", f"a {animal} and a {thing}",
                           f"a {bound['child']} called {name}", f"a {animal_is} {animal}",
                           f"{name}, a {animal} and a {thing}"])
        prompt = re.sub(r"\ba (?=[aeiou])", "an ", rng.choice(ASK).replace("{what}", what))
        prompt += rng.choice(["", "", ".", ".", "!"])
    elif roll < .19:
        prompt = _noise(rng)
    if prompt:
        text = "\n" + text
    given = text.index(name) + len(name) if invented and name not in prompt else 0
    return prompt, text, {"name": name, "animal": animal, "thing": thing, "plot": plot, "given": given,
                          "invented": invented}


def held_out(index):
    return index % HELD_OUT_EVERY == 0


def _stats(count):
    words, texts, plots = set(), set(), {}
    lengths, duplicates, trained = [], 0, set()
    for index in range(count):
        _, text, facts = story(index)
        if not facts["invented"]:
            words.update(w.lower() for w in re.findall(r"[A-Za-z]+", text))
        lengths.append(len(text.split()))
        duplicates += text in texts
        texts.add(text)
        plots[facts["plot"]] = plots.get(facts["plot"], 0) + 1
    lengths.sort()
    print(f"stories {count}, duplicates {duplicates}, distinct words {len(words)}")
    print("words a story: least {}, median {}, most {}".format(lengths[0], lengths[count // 2],
                                                             lengths[-1]))
    print("plots:", ", ".join(f"{k} {v}" for k, v in sorted(plots.items())))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stats"]:
        _stats(int(sys.argv[2]))
    else:
        first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        for i in range(first, first + int(sys.argv[1]) if len(sys.argv) > 1 else first + 5):
            asked, told, _ = story(i)
            print((asked + told).replace("\n", "\\n"))
