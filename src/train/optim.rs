//! AdamW with exportable f32 moments (arXiv 1711.05101), the learning-rate schedules and the gradient sums.
//!
//! candle's own AdamW hides its moments and keeps them in the parameter's dtype, so a run could not be resumed from it.

use std::collections::HashMap;

use candle_core::{DType, Tensor, Var};

use super::Scheduler;
use crate::error::{Error, Result};
use crate::ops::{self, AdamWUpdate};

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
/// Variables updated between two calls of the pace callback.
const PACED: usize = 16;
const EPSILON: f64 = 1e-8;

/// Multiplier of the peak learning rate at optimizer step `step` (from 0) of `total`: what transformers' `get_scheduler` gives, so
/// with warm-up the first step has rate 0.
pub(crate) fn schedule(scheduler: Scheduler, step: usize, total: usize, warmup: usize) -> f64 {
    if step < warmup {
        return step as f64 / warmup.max(1) as f64;
    }
    let rest = total.saturating_sub(warmup).max(1) as f64;
    match scheduler {
        Scheduler::Constant => 1.0,
        Scheduler::Linear => (total.saturating_sub(step) as f64 / rest).max(0.0),
        Scheduler::Cosine => {
            let progress = (step - warmup) as f64 / rest;
            (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
        }
    }
}

/// Steps of warm-up: `ceil(total · ratio)`, as transformers rounds, but fewer than all: the first has rate 0, and a run of one step
/// would learn nothing.
pub(crate) fn warmup_steps(total: usize, ratio: f64) -> usize {
    ((total as f64 * ratio).ceil() as usize).min(total.saturating_sub(1))
}

/// Sums of gradients, one per variable in the variables' order, f32.
pub(crate) struct Gradients {
    sums: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Nothing summed yet.
    pub(crate) fn new(variables: usize) -> Self {
        Gradients { sums: vec![None; variables] }
    }

    /// Adds to the sum of variable `index`.
    pub(crate) fn add(&mut self, index: usize, gradient: &Tensor) -> Result<()> {
        // Detached: a gradient out of candle's backward may still hold the graph it was computed from.
        let gradient = gradient.detach().to_dtype(DType::F32)?;
        let slot = &mut self.sums[index];
        *slot = Some(match slot.take() {
            Some(sum) => ops::add(&sum, &gradient)?,
            None => gradient,
        });
        Ok(())
    }

    /// The sums so far; `None` where nothing was added.
    pub(crate) fn sums(&self) -> &[Option<Tensor>] {
        &self.sums
    }

    /// Global L2 norm of `scale · sums`.
    pub(crate) fn norm(&self, scale: f64) -> Result<f64> {
        let squares = self.sums.iter().flatten().map(|sum| sum.sqr()?.sum_all());
        let squares = squares.collect::<candle_core::Result<Vec<_>>>()?;
        if squares.is_empty() {
            return Ok(0.0);
        }
        // One wait for a GPU, not one for each variable.
        let squares = Tensor::stack(&squares, 0)?.to_vec1::<f32>()?;
        Ok(scale * squares.into_iter().map(f64::from).sum::<f64>().sqrt())
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.sums.iter_mut().for_each(|sum| *sum = None);
    }
}

/// First and second moments of every variable, and how many updates they have seen.
pub(crate) struct AdamW {
    moments: Vec<[Tensor; 2]>,
    updates: usize,
    weight_decay: f64,
}

impl AdamW {
    /// Zero moments.
    pub(crate) fn new(variables: &[(String, Var)], weight_decay: f64) -> Result<Self> {
        let moments = variables
            .iter()
            .map(|(_, variable)| {
                let zeros = || Tensor::zeros(variable.shape(), DType::F32, variable.device());
                Ok([zeros()?, zeros()?])
            })
            .collect::<Result<_>>()?;
        Ok(AdamW { moments, updates: 0, weight_decay })
    }

    /// Updates applied so far.
    pub(crate) fn updates(&self) -> usize {
        self.updates
    }

    /// Bytes of the moments.
    pub(crate) fn bytes(&self) -> usize {
        self.moments.iter().map(|[first, second]| 4 * (first.elem_count() + second.elem_count())).sum()
    }

    /// One update with gradients `scale · sums`; weight decay is decoupled, the order of operations is PyTorch's. `rate` gives
    /// each variable's learning rate by its name; `pace` is called between some of them.
    pub(crate) fn step(
        &mut self,
        variables: &[(String, Var)],
        gradients: &Gradients,
        scale: f64,
        rate: impl Fn(&str) -> f64,
        pace: &mut dyn FnMut(),
    ) -> Result<()> {
        self.updates += 1;
        let correction1 = 1.0 - BETA1.powi(self.updates as i32);
        let correction2 = 1.0 - BETA2.powi(self.updates as i32);
        let all = variables.iter().zip(&mut self.moments).zip(gradients.sums());
        for (index, (((name, variable), moments), sum)) in all.enumerate() {
            if index.is_multiple_of(PACED) {
                pace();
            }
            let Some(sum) = sum else { continue };
            let rate = rate(name);
            let update = AdamWUpdate {
                scale: scale as f32,
                first: [BETA1, 1.0 - BETA1].map(|share| share as f32),
                second: [BETA2, 1.0 - BETA2].map(|share| share as f32),
                inverse_root: (1.0 / correction2.sqrt()) as f32,
                eps: EPSILON as f32,
                step_size: (rate / correction1) as f32,
                left: (1.0 - rate * self.weight_decay) as f32,
            };
            ops::adamw(update, sum, variable, moments)?;
        }
        Ok(())
    }

    /// Moments by variable name, as `NAME.exp_avg` and `NAME.exp_avg_sq` (PyTorch's names for them). The next update changes them.
    pub(crate) fn export(&self, variables: &[(String, Var)]) -> HashMap<String, Tensor> {
        let mut tensors = HashMap::new();
        for ((name, _), [first, second]) in variables.iter().zip(&self.moments) {
            tensors.insert(format!("{name}.exp_avg"), first.clone());
            tensors.insert(format!("{name}.exp_avg_sq"), second.clone());
        }
        tensors
    }

    /// Takes exported moments back.
    pub(crate) fn import(
        &mut self,
        variables: &[(String, Var)],
        tensors: &HashMap<String, Tensor>,
        updates: usize,
    ) -> Result<()> {
        for ((name, variable), moments) in variables.iter().zip(&mut self.moments) {
            let get = |suffix: &str| -> Result<Tensor> {
                let key = format!("{name}.{suffix}");
                match tensors.get(&key) {
                    Some(tensor) if tensor.shape() == variable.shape() && tensor.dtype() == DType::F32 => {
                        Ok(tensor.copy()?.to_device(variable.device())?)
                    }
                    Some(tensor) => Err(Error::unprocessable(
                        &key,
                        format!(
                            "the checkpoint's moment `{key}` is {:?} {:?}, expected f32 {:?}.",
                            tensor.dtype(),
                            tensor.shape(),
                            variable.shape()
                        ),
                    )),
                    None => Err(Error::unprocessable(&key, format!("the checkpoint has no moment `{key}`."))),
                }
            };
            *moments = [get("exp_avg")?, get("exp_avg_sq")?];
        }
        self.updates = updates;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn variables() -> Vec<(String, Var)> {
        let var = |data: &[f32]| Var::from_slice(data, data.len(), &Device::Cpu).unwrap();
        vec![("a".into(), var(&[1.0, -2.0, 0.5])), ("b".into(), var(&[0.25]))]
    }

    fn values(variables: &[(String, Var)]) -> Vec<f32> {
        variables.iter().flat_map(|(_, variable)| variable.to_vec1::<f32>().unwrap()).collect()
    }

    fn gradients(step: usize) -> Gradients {
        let mut gradients = Gradients::new(2);
        let s = step as f32;
        gradients.add(0, &Tensor::new(&[0.1 * s, -0.3, 0.02 * s], &Device::Cpu).unwrap()).unwrap();
        gradients.add(1, &Tensor::new(&[1.0 - 0.5 * s], &Device::Cpu).unwrap()).unwrap();
        gradients
    }

    /// The rule of the paper in f64, element by element.
    fn expected(steps: usize, rate: f64, decay: f64) -> Vec<f64> {
        let mut parameters = [1.0f64, -2.0, 0.5, 0.25];
        let mut first = [0.0f64; 4];
        let mut second = [0.0f64; 4];
        for t in 1..=steps {
            let s = t as f64;
            let gradient = [0.1 * s, -0.3, 0.02 * s, 1.0 - 0.5 * s];
            for i in 0..4 {
                first[i] = BETA1 * first[i] + (1.0 - BETA1) * gradient[i];
                second[i] = BETA2 * second[i] + (1.0 - BETA2) * gradient[i] * gradient[i];
                let m = first[i] / (1.0 - BETA1.powi(t as i32));
                let v = second[i] / (1.0 - BETA2.powi(t as i32));
                parameters[i] -= rate * decay * parameters[i] + rate * m / (v.sqrt() + EPSILON);
            }
        }
        parameters.to_vec()
    }

    #[test]
    fn adamw_follows_the_paper() {
        for decay in [0.0, 0.1] {
            let variables = variables();
            let mut adamw = AdamW::new(&variables, decay).unwrap();
            for step in 1..=7 {
                adamw.step(&variables, &gradients(step), 1.0, |_| 0.03, &mut || ()).unwrap();
            }
            for (got, want) in values(&variables).iter().zip(expected(7, 0.03, decay)) {
                assert!((f64::from(*got) - want).abs() < 2e-6, "{got} {want}");
            }
        }
    }

    #[test]
    fn exported_moments_go_on_bit_for_bit() {
        let (straight, resumed) = (variables(), variables());
        let mut one = AdamW::new(&straight, 0.01).unwrap();
        for step in 1..=6 {
            one.step(&straight, &gradients(step), 0.5, |_| 0.01, &mut || ()).unwrap();
        }
        let mut before = AdamW::new(&resumed, 0.01).unwrap();
        for step in 1..=3 {
            before.step(&resumed, &gradients(step), 0.5, |_| 0.01, &mut || ()).unwrap();
        }
        let exported = before.export(&resumed);
        let mut after = AdamW::new(&resumed, 0.01).unwrap();
        after.import(&resumed, &exported, before.updates()).unwrap();
        for step in 4..=6 {
            after.step(&resumed, &gradients(step), 0.5, |_| 0.01, &mut || ()).unwrap();
        }
        assert_eq!(values(&straight), values(&resumed));
        let mut missing = exported;
        missing.remove("b.exp_avg_sq");
        assert_eq!(after.import(&resumed, &missing, 3).unwrap_err().param.as_deref(), Some("b.exp_avg_sq"));
    }

    #[test]
    fn norm_is_global_and_scaled() {
        let mut gradients = Gradients::new(3);
        gradients.add(0, &Tensor::new(&[3f32, 0.0], &Device::Cpu).unwrap()).unwrap();
        gradients.add(2, &Tensor::new(&[2f32], &Device::Cpu).unwrap()).unwrap();
        gradients.add(2, &Tensor::new(&[2f32], &Device::Cpu).unwrap()).unwrap();
        assert_eq!(gradients.norm(0.5).unwrap(), 2.5);
        gradients.clear();
        assert_eq!(gradients.norm(1.0).unwrap(), 0.0);
    }

    /// transformers: `[get_scheduler(name, opt, warmup, total).lr_lambdas[0](s) for s in range(total + 1)]` with total 8, warmup 2.
    #[test]
    fn schedules_are_those_of_transformers() {
        let curve = |scheduler| (0..=8).map(|step| schedule(scheduler, step, 8, 2)).collect::<Vec<_>>();
        let close = |got: Vec<f64>, want: [f64; 9]| {
            assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-12), "{got:?}");
        };
        close(curve(Scheduler::Linear), [0.0, 0.5, 1.0, 5.0 / 6.0, 4.0 / 6.0, 0.5, 2.0 / 6.0, 1.0 / 6.0, 0.0]);
        let c = 0.5 * 3f64.sqrt();
        close(curve(Scheduler::Cosine), [0.0, 0.5, 1.0, 0.5 + 0.5 * c, 0.75, 0.5, 0.25, 0.5 - 0.5 * c, 0.0]);
        close(curve(Scheduler::Constant), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(schedule(Scheduler::Linear, 0, 3, 0), 1.0);
        assert_eq!(
            (warmup_steps(8, 0.1), warmup_steps(8, 0.0), warmup_steps(20, 0.1), warmup_steps(1, 0.1)),
            (1, 0, 2, 0)
        );
    }
}
