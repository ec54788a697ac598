"""The words of the field, as a newcomer to them would like to have them told."""

GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "MPO (matrix product operator)",
        "A large matrix written as a chain of small tensors, the cores. Multiplied together they "
        "give the matrix back, exactly or nearly; stored one by one they take far less room.",
    ),
    (
        "Core, site",
        "A core is one tensor of the chain, a site its position. Each site carries a part of the "
        "matrix's rows (its out dim) and of its columns (its in dim).",
    ),
    (
        "Layout",
        "How rows and columns are divided among the sites, written out × in per site: 32x28,32x28 "
        "is a 1024 × 784 matrix on two sites. The layout 1024x1,1x784 is called SVD, because its "
        "best MPO is the truncated singular value decomposition.",
    ),
    (
        "Bond dimension",
        "The size of the index that links two neighbouring cores. It is the dial between small "
        "and exact: larger keeps more of the matrix and takes more room.",
    ),
    (
        "Schmidt values",
        "The singular values at a bond, largest first. They say how much each of the bond's "
        "dimensions contributes; those far below the first hardly matter.",
    ),
    (
        "Entanglement entropy",
        "One number per bond for how evenly the Schmidt values s are spread: −Σ p ln p with "
        "p = s²/Σs², in nats. Its exponential is the effective bond dimension, the number of "
        "dimensions that do the work.",
    ),
    (
        "Relative error",
        "The size of the difference divided by the size of the original (Frobenius norm): 0 is "
        "exact, 100 % is as wrong as all zeros. Weight error compares weights, output error what "
        "the layer gives on data.",
    ),
    (
        "Compression ratio",
        "Before divided by after: above 1 is smaller. This page always says of what.",
    ),
    (
        "Multiply-adds",
        "One multiplication and one addition, the unit of computing work; counted here for one "
        "input row through each layer.",
    ),
)
