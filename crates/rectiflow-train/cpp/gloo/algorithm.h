#pragma once // The wheel has c10d's headers and not Gloo's; c10d's name only what is declared in these five files.
