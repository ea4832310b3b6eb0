# Formulas between dollars as Doxygen writes them.
s/\$\$([^$]+)\$\$/\\f[\1\\f]/g
s/\$([^$`]+)\$/\\f$\1\\f$/g
