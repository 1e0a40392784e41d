//! The gradient of every op in `ops/` against central differences of its own forward.

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rdpo::error::Result;
use rdpo::ops::{
    Activation, CausalMask, FrozenLinear, Segment, Trained, add, causal_attention, dropout, gated, linears, low_rank,
    record, reshape, rms_norm, rope, token_logprobs,
};

const STEP: f32 = 1e-2;

fn numbers(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let data: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0f32..1.0)).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// `Σ op(inputs) ⊙ weights`: its gradient in every input, by the op's backward and by differences, must agree.
fn check(name: &str, shapes: &[&[usize]], op: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let tensors: Vec<Tensor> = shapes.iter().zip(1..).map(|(shape, seed)| numbers(shape, seed)).collect();
    let (out, tape) = record(&tensors, || op(&tensors)).unwrap();
    let weights = numbers(out.dims(), 99);
    let found = tape.backward([(&out, weights.clone())]).unwrap();
    let weights = flat(&weights);
    let sum = |at: &[Tensor]| -> f64 {
        flat(&op(at).unwrap()).iter().zip(&weights).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum()
    };
    for (index, input) in tensors.iter().enumerate() {
        let gradient = flat(found.get(input).unwrap_or_else(|| panic!("{name}: input {index} has no gradient")));
        let largest = gradient.iter().fold(0f32, |m, g| m.max(g.abs()));
        assert!(largest > 1e-3, "{name}: input {index}'s gradient is nothing");
        let values = flat(input);
        for at in (0..values.len()).step_by(values.len().div_ceil(24)) {
            let moved = |by: f32| {
                let mut values = values.clone();
                values[at] += by;
                let mut all = tensors.clone();
                all[index] = Tensor::from_vec(values, input.dims(), &Device::Cpu).unwrap();
                sum(&all)
            };
            let slope = ((moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP)) as f32;
            let gap = (slope - gradient[at]).abs();
            assert!(gap < 2e-3 * largest.max(1.0), "{name}, input {index}[{at}]: {slope} is not {}", gradient[at]);
        }
    }
}

#[test]
fn linear() {
    let bias = numbers(&[5], 8);
    let frozen = FrozenLinear::new(&numbers(&[5, 7], 7), Some(&bias)).unwrap();
    check("frozen linear", &[&[3, 7]], |x| frozen.forward(&x[0]));
    check("linears", &[&[3, 7]], |x| {
        let [y, z] = linears(&x[0], [(&frozen, vec![]), (&frozen, vec![])], &[])?;
        add(&y, &gated(&z, &z, Activation::Silu)?)
    });
    let trained = |base, x: &[Tensor]| {
        let [y] = low_rank(&x[0], [Trained { base, a: &x[1], b: &x[2], scale: 1.5 }])?;
        Ok(y)
    };
    check("low rank", &[&[3, 7], &[2, 7], &[5, 2]], |x| trained(Some(&frozen), x));
    check("low rank alone", &[&[3, 7], &[2, 7], &[5, 2]], |x| trained(None, x));
}

/// Gradients that meet: of a residual's input, of the input of several linears, of one tensor added to itself.
#[test]
fn ops_that_share_their_input() {
    let linear = |out, input, seed| FrozenLinear::new(&numbers(&[out, input], seed), None).unwrap();
    let (one, other, back) = (linear(5, 7, 7), linear(5, 7, 8), linear(7, 5, 9));
    let weight = numbers(&[7], 10);
    check("block", &[&[3, 7], &[2, 7], &[5, 2], &[1, 7], &[5, 1]], |x| {
        let normed = rms_norm(&x[0], &weight, 1e-5)?;
        let one = Trained { base: Some(&one), a: &x[1], b: &x[2], scale: 1.5 };
        let other = Trained { base: Some(&other), a: &x[3], b: &x[4], scale: 0.5 };
        let [y, z] = low_rank(&normed, [one, other])?;
        let y = add(&add(&y, &z)?, &one.base.unwrap().forward(&normed)?)?;
        reshape(&add(&x[0], &back.forward(&add(&y, &y)?)?)?, (7, 3))
    });
}

#[test]
fn rows() {
    let weight = numbers(&[12], 7);
    check("rms norm", &[&[3, 12]], |x| rms_norm(&x[0], &weight, 1e-5));
    for activation in [Activation::Silu, Activation::GeluTanh] {
        check("gated", &[&[3, 9], &[3, 9]], |x| gated(&x[0], &x[1], activation));
    }
    let (cos, sin) = (numbers(&[3, 4], 7), numbers(&[3, 4], 8));
    check("rope", &[&[3, 2, 8]], |x| rope(&x[0], &cos, &sin));
    check("dropout", &[&[6, 9]], |x| dropout(&x[0], 0.3, 5));
}

/// Two answers behind one prompt and a sequence of its own, with and without a window, at head sizes for every kernel.
#[test]
fn attention() {
    let segment = |start, len, prefix| Segment { start, len, prefix };
    let mask = CausalMask::new(
        vec![segment(0, 3, 0..0), segment(3, 2, 0..3), segment(5, 3, 0..3), segment(8, 2, 0..0)],
        vec![0, 1, 2, 3, 4, 3, 4, 5, 0, 1],
    );
    for (head_dim, window) in [(16, None), (16, Some(2)), (64, None), (10, Some(3))] {
        check("attention", &[&[10, 4, head_dim], &[10, 2, head_dim], &[10, 2, head_dim]], |x| {
            causal_attention(&x[0], &x[1], &x[2], &mask, 0.3, window, DType::F32)
        });
    }
}

#[test]
fn head() {
    let frozen = FrozenLinear::new(&numbers(&[40, 6], 7), None).unwrap();
    let targets = [3, 39, 0, 17, 3];
    check("token log-probs", &[&[5, 6]], |x| token_logprobs(&x[0], &frozen, &targets, &mut || Ok(())));
}

/// bf16 products round both sides; the gradient must still be that of the weights as they are kept.
#[test]
fn bf16_weights_pass_gradients_too() {
    let weight = numbers(&[32, 64], 7).to_dtype(DType::BF16).unwrap();
    let frozen = FrozenLinear::new(&weight, None).unwrap();
    let x = numbers(&[4, 64], 1);
    let dy = numbers(&[4, 32], 2);
    let (y, tape) = record([&x], || frozen.forward(&x)).unwrap();
    let found = tape.backward([(&y, dy.clone())]).unwrap();
    let exact = flat(&dy.matmul(&weight.to_dtype(DType::F32).unwrap()).unwrap());
    for (got, exact) in flat(found.get(&x).unwrap()).iter().zip(&exact) {
        // Eight bits of mantissa on both sides of 32 products of at most 1.
        assert!((got - exact).abs() < 0.06, "{got} is not {exact}");
    }
}
