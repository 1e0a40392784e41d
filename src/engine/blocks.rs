//! Blocks of the KV pool: who holds which, which full blocks can be shared, which go first when room is needed. No tensor.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};

/// Hash of a block and of everything before it; [`root`] starts a chain.
pub(super) type Chain = u64;

/// The start of all chains of one adapter generation: KV of one is wrong for another. Who sends a salt shares with nobody who
/// does not know it.
pub(super) fn root(generation: Option<&str>, salt: Option<&str>) -> Chain {
    chain(0, &(generation.unwrap_or("base"), salt))
}

fn chain(parent: Chain, content: &impl Hash) -> Chain {
    let mut hasher = DefaultHasher::new();
    (parent, content).hash(&mut hasher);
    hasher.finish()
}

#[derive(Clone, Debug, Default)]
struct Block {
    holders: usize,
    /// Set while the block can be found: its chain, its parent's, its tokens (equal hashes are not trusted).
    content: Option<(Chain, Chain, Vec<u32>)>,
    /// Place in the eviction order while nobody holds it.
    released_at: u64,
}

/// Every block is free, cached (findable, held by nobody) or held.
#[derive(Debug)]
pub(super) struct BlockManager {
    block_size: usize,
    blocks: Vec<Block>,
    free: Vec<u32>,
    by_chain: HashMap<Chain, u32>,
    /// Cached blocks, least recently used first.
    cached: BTreeMap<u64, u32>,
    clock: u64,
}

impl BlockManager {
    pub(super) fn new(num_blocks: usize, block_size: usize) -> Self {
        BlockManager {
            block_size,
            blocks: vec![Block::default(); num_blocks],
            free: (0..num_blocks as u32).rev().collect(),
            by_chain: HashMap::new(),
            cached: BTreeMap::new(),
            clock: 0,
        }
    }

    pub(super) fn total(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn num_free(&self) -> usize {
        self.free.len()
    }

    pub(super) fn num_cached(&self) -> usize {
        self.cached.len()
    }

    /// Blocks that can be had now.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// One block, evicting the least recently used cached one if none is free.
    pub(super) fn allocate(&mut self) -> Option<u32> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let (_, id) = self.cached.pop_first()?;
                if let Some((own, ..)) = self.blocks[id as usize].content.take() {
                    self.by_chain.remove(&own);
                }
                id
            }
        };
        self.blocks[id as usize].holders = 1;
        Some(id)
    }

    /// The longest run of cached blocks that begin `tokens`, each with the chain it ends.
    fn prefix<'a>(&'a self, root: Chain, tokens: &'a [u32]) -> impl Iterator<Item = (u32, Chain)> + 'a {
        tokens.chunks_exact(self.block_size).scan(root, |at, piece| {
            let next = chain(*at, &piece);
            let id = *self.by_chain.get(&next)?;
            let content = self.blocks[id as usize].content.as_ref();
            let is_it = content.is_some_and(|(_, parent, own)| parent == at && own == piece);
            *at = next;
            is_it.then_some((id, next))
        })
    }

    /// How many blocks [`BlockManager::find_prefix`] would find.
    pub(super) fn count_prefix(&self, root: Chain, tokens: &[u32]) -> usize {
        self.prefix(root, tokens).count()
    }

    /// The longest run of cached blocks that begin `tokens`, each now held once more, and the chain they end.
    pub(super) fn find_prefix(&mut self, root: Chain, tokens: &[u32]) -> (Vec<u32>, Chain) {
        let (found, chains): (Vec<u32>, Vec<Chain>) = self.prefix(root, tokens).unzip();
        for id in &found {
            let block = &mut self.blocks[*id as usize];
            if block.holders == 0 {
                self.cached.remove(&block.released_at);
            }
            block.holders += 1;
        }
        (found, chains.last().copied().unwrap_or(root))
    }

    /// Makes a full block findable under the chain that ends with it, which is returned.
    pub(super) fn seal(&mut self, id: u32, parent: Chain, tokens: &[u32]) -> Chain {
        let own = chain(parent, &tokens);
        // The first block with this content stays the one that is found.
        if self.blocks[id as usize].content.is_none() && !self.by_chain.contains_key(&own) {
            self.by_chain.insert(own, id);
            self.blocks[id as usize].content = Some((own, parent, tokens.to_vec()));
        }
        own
    }

    /// One holder less. The last blocks of a sequence should be released first: they are the least likely to be shared.
    pub(super) fn release(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        block.holders = block.holders.checked_sub(1).expect("a held block is released. This is a bug.");
        if block.holders > 0 {
            return;
        }
        if block.content.is_some() {
            self.clock += 1;
            block.released_at = self.clock;
            self.cached.insert(self.clock, id);
        } else {
            self.free.push(id);
        }
    }

    /// Panics unless every block is in exactly one state and `holders` is what the callers hold.
    #[cfg(test)]
    pub(super) fn check_integrity(&self, held: &[Vec<u32>]) {
        let mut holders = vec![0usize; self.blocks.len()];
        held.iter().flatten().for_each(|id| holders[*id as usize] += 1);
        for (id, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.holders, holders[id], "holders of block {id}");
            let places = usize::from(self.free.contains(&(id as u32)))
                + self.cached.values().filter(|cached| **cached == id as u32).count()
                + usize::from(block.holders > 0);
            assert_eq!(places, 1, "block {id} is free, cached or held, and only one of them");
            if let Some((own, ..)) = &block.content {
                assert_eq!(self.by_chain.get(own), Some(&(id as u32)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_found_under_its_own_adapter_only_and_never_whole() {
        let mut manager = BlockManager::new(4, 2);
        let tokens = [1, 2, 3, 4];
        let base = root(None, None);
        let blocks = [manager.allocate(), manager.allocate()].map(Option::unwrap_or_default);
        let first = manager.seal(blocks[0], base, &tokens[..2]);
        manager.seal(blocks[1], first, &tokens[2..]);
        assert_eq!(manager.find_prefix(base, &tokens[..3]).0, blocks[..1], "only whole blocks");
        for other in [root(Some("other"), None), root(None, Some("salt"))] {
            assert_eq!(manager.find_prefix(other, &tokens).0, [0u32; 0]);
        }
        manager.check_integrity(&[blocks.to_vec(), vec![blocks[0]]]);
        for id in [blocks[0], blocks[1], blocks[0]] {
            manager.release(id);
        }
        assert_eq!((manager.num_free(), manager.num_cached()), (2, 2));
        let all: Vec<u32> = (0..4).filter_map(|_| manager.allocate()).collect();
        assert_eq!((all.len(), manager.allocate()), (4, None));
        assert_eq!(manager.find_prefix(base, &tokens).0, [0u32; 0], "evicted blocks are not found");
        manager.check_integrity(&[all]);
    }
}
