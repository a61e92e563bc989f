"""Union-find: disjoint sets of numbers that are united one by one. grouping.py keeps its groups in one."""


class UnionFind:
    """Disjoint sets of the numbers from 0 to `size` - 1, at first each in a set of its own."""

    def __init__(self, size: int):
        # The parent of a root is the root itself.
        self._parents = list(range(size))

    def find_root(self, member: int) -> int:
        """Return the number that stands for the set of a member: the smallest in it."""
        parents = self._parents
        while parents[member] != member:
            # Halve the path, so that later searches are short.
            parents[member] = parents[parents[member]]
            member = parents[member]
        return member

    def unite(self, root: int, other_root: int) -> None:
        """Unite the sets of two roots; the smaller root stays one."""
        smaller, larger = sorted((root, other_root))
        self._parents[larger] = smaller

    def list_roots(self) -> list[int]:
        """Return the root of every number."""
        return [self.find_root(member) for member in range(len(self._parents))]
