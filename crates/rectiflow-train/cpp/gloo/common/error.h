#pragma once // Nothing of it is named in c10d's headers.
