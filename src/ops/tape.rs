//! What ran, in order, and how gradients go back through it.
//!
//! candle's own backward makes zeros for every gradient and adds the gradient to them, on one thread. Here a tensor's first gradient is
//! kept as it is, and an op may add its own to it in the same pass over memory.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;

use candle_core::{Shape, Tensor, TensorId, Var};

use super::{cpu, cuda};
use crate::cores::each;
use crate::error::{Error, Result};
use crate::kernels::cpu::add_row;
use crate::kernels::cuda as gpu;

/// Numbers a task adds at once.
const CHUNK: usize = 4096;

thread_local! {
    static RECORDING: RefCell<Option<Tape>> = const { RefCell::new(None) };
    static UNREAD: Cell<bool> = const { Cell::new(false) };
}

/// The ops that ran between some leaves and what was made of them.
pub struct Tape {
    leaves: HashSet<TensorId>,
    /// The leaves, and what depends on one.
    wanted: HashSet<TensorId>,
    steps: Vec<Step>,
    recipes: HashMap<TensorId, Recipe>,
    /// What is dear to make and small to keep, in order.
    dear: Vec<Dear>,
    /// Whether all of it ran before, and only the way back is wanted; what is left of its dear results.
    again: Option<VecDeque<Dear>>,
}

/// Results of an op that are dear to make and small to keep.
pub type Dear = [Tensor; 2];

/// How to make a tensor again out of what is kept in any case.
pub(super) type Recipe = Rc<dyn Fn() -> Result<Tensor>>;

struct Step {
    outputs: Vec<TensorId>,
    /// What the way back reads.
    kept: Vec<Tensor>,
    back: Back,
}

/// From the gradients of a step's outputs, as far as there are any, to those of its inputs.
type Back = Box<dyn FnOnce(Vec<Option<Gradient>>, &mut Gradients) -> Result<()>>;

/// A gradient on its way back.
pub(super) struct Gradient {
    pub(super) tensor: Tensor,
    /// Whether somebody else holds it too, so that nothing may be added to it in place.
    pub(super) shared: bool,
}

/// Gradients of a backward pass, by the tensors they belong to.
pub struct Gradients {
    wanted: HashSet<TensorId>,
    found: HashMap<TensorId, Gradient>,
}

/// Runs `work` and records the ops of [`crate::ops`] that depend on `leaves`; what this thread asks of candle itself is not recorded.
pub fn record<'a, T>(
    leaves: impl IntoIterator<Item = &'a Tensor>,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Tape)> {
    recorded(leaves, work, None)
}

/// [`record`] of work that ran before, for its tape: what [`only_added`] marks has any numbers. `dear` are [`Tape::dear`] of that time,
/// or nothing.
pub fn record_again<'a, T>(
    leaves: impl IntoIterator<Item = &'a Tensor>,
    dear: Vec<Dear>,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Tape)> {
    recorded(leaves, work, Some(dear.into()))
}

/// Runs `work`, which makes linears of something whose outputs are read by nothing but sums: no way back needs their numbers.
pub fn only_added<T>(work: impl FnOnce() -> T) -> T {
    /// Ends it, also where `work` panics.
    struct Unread;
    impl Drop for Unread {
        fn drop(&mut self) {
            UNREAD.set(false);
        }
    }
    UNREAD.set(RECORDING.with_borrow(|tape| tape.as_ref().is_some_and(|tape| tape.again.is_some())));
    let _unread = Unread;
    work()
}

/// Whether nobody reads the output of the linear at hand.
pub(super) fn is_unread() -> bool {
    UNREAD.get()
}

fn recorded<'a, T>(
    leaves: impl IntoIterator<Item = &'a Tensor>,
    work: impl FnOnce() -> Result<T>,
    again: Option<VecDeque<Dear>>,
) -> Result<(T, Tape)> {
    /// Ends the recording, also where `work` panics.
    struct Recording;
    impl Drop for Recording {
        fn drop(&mut self) {
            RECORDING.set(None);
        }
    }
    if RECORDING.with_borrow(Option::is_some) {
        return Err(Error::internal("A recording inside another. This is a bug."));
    }
    let leaves: HashSet<TensorId> = leaves.into_iter().map(Tensor::id).collect();
    let wanted = leaves.clone();
    RECORDING.set(Some(Tape { wanted, leaves, steps: Vec::new(), recipes: HashMap::new(), dear: Vec::new(), again }));
    let recording = Recording;
    let result = work()?;
    let tape = RECORDING.take();
    drop(recording);
    match tape {
        Some(tape) => Ok((result, tape)),
        None => Err(Error::internal("A recording was lost. This is a bug.")),
    }
}

/// Whether a gradient of one of these tensors will be asked for.
pub(super) fn tracked(tensors: &[&Tensor]) -> bool {
    RECORDING.with_borrow(|tape| {
        tape.as_ref().is_some_and(|tape| tensors.iter().any(|tensor| tape.wanted.contains(&tensor.id())))
    })
}

/// Says how to make a tensor again, for who would else have to keep it. Cheap ones only: nothing of a product.
pub(super) fn push_recipe(of: &Tensor, make: impl Fn() -> Result<Tensor> + 'static) {
    RECORDING.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.recipes.insert(of.id(), Rc::new(make));
        }
    });
}

/// What [`push_recipe`] was told of that tensor.
pub(super) fn recipe(of: &Tensor) -> Option<Recipe> {
    RECORDING.with_borrow(|tape| tape.as_ref()?.recipes.get(&of.id()).cloned())
}

/// Results that are dear to make and small to keep: those of the last time, where it was recorded and they were kept.
pub(super) fn dear(make: impl FnOnce() -> Result<Dear>) -> Result<Dear> {
    let kept = |tape: &mut Option<Tape>| tape.as_mut()?.again.as_mut()?.pop_front();
    let results = match RECORDING.with_borrow_mut(kept) {
        Some(results) => results,
        None => make()?,
    };
    RECORDING.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.dear.push(results.clone());
        }
    });
    Ok(results)
}

/// Records an op of several outputs, if one of its inputs is [`tracked`]. `kept` are the tensors that `back` holds.
pub(super) fn push_all(
    inputs: &[&Tensor],
    outputs: &[&Tensor],
    kept: &[&Tensor],
    back: impl FnOnce(Vec<Option<Gradient>>, &mut Gradients) -> Result<()> + 'static,
) {
    if !tracked(inputs) {
        return;
    }
    let ids = |tensors: &[&Tensor]| tensors.iter().map(|tensor| tensor.id()).collect::<Vec<_>>();
    let kept = kept.iter().map(|tensor| (*tensor).clone()).collect();
    RECORDING.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.wanted.extend(ids(outputs));
            tape.steps.push(Step { outputs: ids(outputs), kept, back: Box::new(back) });
        }
    });
}

/// [`push_all`] of an op with one output.
pub(super) fn push(
    inputs: &[&Tensor],
    output: &Tensor,
    kept: &[&Tensor],
    back: impl FnOnce(Gradient, &mut Gradients) -> Result<()> + 'static,
) {
    push_all(inputs, &[output], kept, move |mut dy, gradients| match dy.pop().flatten() {
        Some(dy) => back(dy, gradients),
        None => Ok(()),
    });
}

/// An op made of candle's own, with candle's own backward.
pub(super) fn composed<const N: usize>(
    inputs: [&Tensor; N],
    op: impl Fn([&Tensor; N]) -> Result<Tensor>,
) -> Result<Tensor> {
    if !tracked(&inputs) {
        return op(inputs);
    }
    let variables = inputs.map(|input| Var::from_tensor(&input.detach()));
    let variables = variables.into_iter().collect::<candle_core::Result<Vec<_>>>()?;
    let graph = op(std::array::from_fn(|index| variables[index].as_tensor()))?;
    let (output, ids) = (graph.detach(), inputs.map(Tensor::id));
    let kept: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
    push(&inputs, &output, &kept.iter().chain([&output]).collect::<Vec<_>>(), move |dy, gradients| {
        let found = (&graph * &dy.tensor)?.sum_all()?.backward()?;
        for (id, variable) in ids.into_iter().zip(&variables) {
            if let Some(gradient) = found.get(variable) {
                gradients.add(id, gradient.detach())?;
            }
        }
        Ok(())
    });
    Ok(output)
}

impl Tape {
    /// What of it is dear to make and small to keep, in order.
    pub fn dear(&self) -> &[Dear] {
        &self.dear
    }

    /// Bytes of the distinct tensors that the way back needs, leaves left out.
    pub fn bytes(&self) -> usize {
        let mut seen = HashSet::new();
        let mut bytes = 0;
        for tensor in self.steps.iter().flat_map(|step| &step.kept).filter(|tensor| !self.leaves.contains(&tensor.id()))
        {
            let (storage, _) = tensor.storage_and_layout();
            if seen.insert(std::ptr::from_ref(&*storage).addr()) {
                bytes += tensor.elem_count() * tensor.dtype().size_in_bytes();
            }
        }
        bytes
    }

    /// Gradients of `Σ y ⊙ dy` by the leaves, for pairs of an output y and its dy of the same shape.
    pub fn backward<'a>(self, seeds: impl IntoIterator<Item = (&'a Tensor, Tensor)>) -> Result<Gradients> {
        // Who needs one holds it: what it is made of goes with the last of them.
        drop((self.recipes, self.dear));
        let mut gradients = Gradients { wanted: self.wanted, found: HashMap::new() };
        for (y, dy) in seeds {
            gradients.put(y.id(), Gradient { tensor: dy.reshape(y.shape())?.to_dtype(y.dtype())?, shared: true })?;
        }
        for step in self.steps.into_iter().rev() {
            let dy: Vec<_> = step.outputs.iter().map(|output| gradients.found.remove(output)).collect();
            if dy.iter().any(Option::is_some) {
                (step.back)(dy, &mut gradients)?;
            }
        }
        Ok(gradients)
    }
}

impl Gradients {
    /// The gradient of a leaf, if it has one.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.found.get(&leaf.id()).map(|gradient| &gradient.tensor)
    }

    /// Takes the gradient of a leaf, if it has one.
    pub fn remove(&mut self, leaf: &Tensor) -> Option<Tensor> {
        self.found.remove(&leaf.id()).map(|gradient| gradient.tensor)
    }

    /// Whether anybody asks for the gradient of that tensor.
    pub(super) fn wants(&self, id: TensorId) -> bool {
        self.wanted.contains(&id)
    }

    /// Takes what there is so far.
    pub(super) fn take(&mut self, id: TensorId) -> Option<Tensor> {
        self.found.remove(&id).map(|gradient| gradient.tensor)
    }

    /// Adds a gradient that nobody else holds.
    pub(super) fn add(&mut self, id: TensorId, tensor: Tensor) -> Result<()> {
        self.put(id, Gradient { tensor, shared: false })
    }

    /// Adds a gradient that others may hold too.
    pub(super) fn add_shared(&mut self, id: TensorId, tensor: &Tensor) -> Result<()> {
        self.put(id, Gradient { tensor: tensor.clone(), shared: true })
    }

    /// Adds numbers of the CPU: `onto` adds them to those that are there, `fresh` makes them where there are none yet.
    pub(super) fn add_floats(
        &mut self,
        id: TensorId,
        shape: Shape,
        fresh: impl FnOnce() -> candle_core::Result<Vec<f32>>,
        onto: impl FnOnce(&mut [f32]) -> candle_core::Result<()>,
    ) -> Result<()> {
        let tensor = match self.found.remove(&id) {
            None => cpu::tensor(fresh()?, shape)?,
            Some(Gradient { tensor, shared }) => {
                let tensor = if shared || !tensor.is_contiguous() { tensor.force_contiguous()? } else { tensor };
                cpu::with_floats_mut(&tensor, onto)?;
                tensor
            }
        };
        self.add(id, tensor)
    }

    /// Adds a gradient.
    pub(super) fn put(&mut self, id: TensorId, new: Gradient) -> Result<()> {
        if !self.wants(id) {
            return Ok(());
        }
        let sum = match self.found.remove(&id) {
            None => new,
            Some(before) => summed(before, new)?,
        };
        self.found.insert(id, sum);
        Ok(())
    }
}

fn summed(a: Gradient, b: Gradient) -> Result<Gradient> {
    let (to, other) = if a.shared { (b, a) } else { (a, b) };
    let (own, like) = (!to.shared && to.tensor.is_contiguous(), to.tensor.dtype() == other.tensor.dtype());
    if own && like && cuda::takes(&to.tensor) {
        cuda::with_views([&to.tensor, &other.tensor.contiguous()?], |[to, other]| gpu::add_onto(to, other))?;
        return Ok(to);
    }
    if !own || !to.tensor.device().is_cpu() {
        return Ok(Gradient { tensor: (to.tensor.detach() + other.tensor.detach())?, shared: false });
    }
    let other = other.tensor.contiguous()?;
    cpu::with_floats([&other], |[other]| {
        cpu::with_floats_mut(&to.tensor, |to| {
            each(to.chunks_mut(CHUNK).zip(other.chunks(CHUNK)), |(to, other)| add_row(other, to));
            Ok(())
        })
    })?;
    Ok(to)
}
