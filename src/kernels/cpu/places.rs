//! Memory that the tasks of an operation write, each its own part.

use crate::cores::each;

/// A raw output that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(super) struct Out<T = f32>(pub(super) *mut T);
// SAFETY: every task writes its own rows and columns only.
unsafe impl<T: Send> Send for Out<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Out<T> {}

impl<T> Out<T> {
    pub(super) fn at(self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

/// A vector of `len` numbers that `fill` writes all of.
///
/// # Safety
/// `fill` writes every one of the `len` numbers behind the pointer it is given.
pub(super) unsafe fn filled<T>(len: usize, fill: impl FnOnce(Out<T>)) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    fill(Out(values.as_mut_ptr()));
    // SAFETY: the capacity is `len`, and `fill` wrote them all.
    unsafe { values.set_len(len) };
    values
}

/// N vectors of `len` numbers, worked out some at a time: `work` is given where a chunk of at most `chunk` begins and its places in each
/// vector, zeroed. Chunk by chunk they are zeroed by whoever writes them, in cache.
pub fn in_chunks<const N: usize>(
    len: usize,
    chunk: usize,
    work: impl Fn(usize, [&mut [f32]; N]) + Sync,
) -> [Vec<f32>; N] {
    let mut found: [Vec<f32>; N] = std::array::from_fn(|_| Vec::with_capacity(len));
    let places = found.each_mut().map(|values| Out(values.as_mut_ptr()));
    let one = |index: usize| {
        let at = index * chunk;
        let count = chunk.min(len - at);
        let parts = places.map(|place| {
            // SAFETY: the chunk is inside the capacity and this task's alone.
            unsafe {
                place.at(at).write_bytes(0, count);
                std::slice::from_raw_parts_mut(place.at(at), count)
            }
        });
        work(at, parts);
    };
    each(0..len.div_ceil(chunk), one);
    for values in &mut found {
        // SAFETY: the tasks zeroed them all, at least.
        unsafe { values.set_len(len) };
    }
    found
}
