"""Words of the diorama's prompts: names of things, and colours, as in its procedural world."""

_NAMES = """
acrobat, airplane, alarm clock, alien, alligator, alpaca, ambulance, american football, anchor,
ant, apple, artist, astronaut, automobile, avocado, baby chick, backpack, bag of money, ball of
yarn, balloon, banana, baseball, basketball, basketball player, bat, beaver, bed, bee, bell,
bicycle, bike, bird, birthday cake, bison, blowfish, book, books, boot, boulder, bouquet, bowl
of noodles, box truck, boy, broccoli, brontosaurus, broom, brown horse, bubble tea, bucket,
buffalo, builder, bunch of grapes, burger, bus, butterfly, cab, cactus, camel, camera, candle,
candy, canoe, car, cardboard box, carousel horse, carrot, castle, cat, caterpillar, chair,
cheese, cheetah, chef, chick, chicken leg, chipmunk, christmas tree, church, circus tent, cloud,
clown, cockerel, coconut, coin, comet, compass, construction worker, cook, cookie, coral, corn
cob, couch, cow, crab, crescent moon, cricket, crocodile, croissant, crystal ball, cup of
coffee, cupcake, dancer, dartboard, deer, delivery truck, detective, diamond, diamond ring,
dinosaur, disco ball, doctor, dodo, dog, dolphin, donkey, donut, doughnut, dove, dragon, drum,
drumstick, duck, eagle, egg, elephant, factory, fairy, farmer, ferris wheel, fire, fire engine,
fire truck, firefighter, fish, flamingo, flower, flying saucer, fountain, fox, french fries,
fries, frog, full moon, ghost, gift box, giraffe, girl, globe, goat, goose, gorilla, graduation
cap, grandfather, grandmother, grasshopper, guitar, hamburger, hammer, hare, headphones, heart,
hedgehog, helicopter, hippo, hippopotamus, hog, honey jar, honey pot, honeybee, horse, hospital,
hot dog, hourglass, house, house cat, hut, ice cream cone, jack-o-lantern, jeep, jellyfish,
jockey, juggler, kangaroo, key, kite, koala, ladybird, ladybug, lemon, leopard, light bulb,
lion, llama, loaf of bread, lobster, locomotive, lollipop, long-necked dinosaur, lorry, magic
wand, magnet, mailbox, mallard, mammoth, man, mermaid, microphone, minibus, monkey, moped, motor
boat, motorbike, motorcycle, mouse, mushroom, ninja, octopus, office tower, old man, old woman,
orange, orangutan, otter, owl, pagoda, painter, palm tree, pancakes, panda, paper lantern,
parrot, peach, peacock, pear, pencil, penguin, pet dog, pickup truck, pie, pig, pilot, pinata,
pine tree, pineapple, pizza slice, plane, planet, playground slide, polar bear, police car,
police officer, poodle, popcorn, potted plant, prawn, present, pretzel, princess, propeller
plane, pufferfish, pumpkin, puzzle piece, rabbit, race car, racing car, radio, rain cloud,
rainbow, rhino, rhinoceros, rickshaw, ring, ringed planet, robot, rock, rocket, roller skate,
rooster, rose, runner, sailboat, sailing boat, sandwich, santa claus, satellite, saxophone,
scissors, scooter, sea lion, sea otter, seal, seashell, semi truck, shark, sheaf of rice, sheep,
ship, shopping cart, shrimp, skateboard, slice of pizza, slice of watermelon, smartphone,
smiling moon, smiling sun, snail, snake, sneaker, snowman, soccer ball, sorcerer, spaceship,
speedboat, spider, squid, squirrel, stag, star, steam train, storm cloud, strawberry, suitcase,
sun, sunflower, sunglasses, superhero, sushi, suv, swan, t-rex, t-shirt, taco, tangerine, taxi,
teapot, teddy bear, telephone, telescope, television, temple, tennis racket, tiger, tomato, top
hat, tortoise, tower, tractor, traffic light, train, tree, trophy, tropical fish, trumpet,
tuk-tuk, tulip, turtle, ufo, umbrella, unicorn, vampire, van, vase, violin, volcano, volleyball,
waffle, weightlifter, whale, wheel, wizard, wolf, woman, woolly mammoth, yacht, zebra, zombie
"""

THING_NAMES = frozenset(" ".join(name.split()) for name in _NAMES.split(","))
COLOUR_NAMES = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "white",
    "black",
    "golden",
)
