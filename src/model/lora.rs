//! Low-rank adapters (arXiv 2106.09685): variables while training, deep frozen copies once published.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::layer::{block_sites, site_path, site_shape, sites_after};
use super::{Decoder, ModelConfig};
use crate::error::{Error, Result};
use crate::ops::{FrozenLinear, ServedRows, Trained, add, dropout, linears, low_rank};
use crate::seed::{STEP, mixed};
use crate::weights::{AdapterFile, LoraConfig};

/// Linears of a layer that may carry LoRA, by their Hugging Face names.
pub const SITES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// A published adapter: frozen deep copies, safe to serve while training goes on. Holding an `Arc` of it is the lease.
pub struct Adapter {
    /// SHA-256 in hex over config and weights; seeds the prefix cache.
    pub generation: String,
    /// The PEFT configuration.
    pub config: LoraConfig,
    /// Bytes held.
    pub bytes: usize,
    /// `(layer, index into SITES)` → A: (R, in), B: (out, R), already scaled.
    pub sites: BTreeMap<(usize, usize), (FrozenLinear, FrozenLinear)>,
}

impl Adapter {
    /// Checks every tensor against the model (422 naming the tensor) and copies it.
    pub fn from_file(file: &AdapterFile, model: &Decoder) -> Result<Self> {
        let mut sites = BTreeMap::new();
        for ((layer, site), (a, b, scale)) in checked(file, model.config())? {
            let frozen = |tensor: &Tensor| {
                let dtype = model.linear(layer, site).low_rank_dtype();
                FrozenLinear::new(&tensor.detach().copy()?.to_device(model.device())?.to_dtype(dtype)?, None)
            };
            sites.insert((layer, site), (frozen(&a)?, frozen(&(b * scale)?)?));
        }
        Ok(Adapter {
            generation: file.generation()?,
            config: file.config.clone(),
            bytes: sites.values().map(|(a, b): &(FrozenLinear, FrozenLinear)| a.bytes() + b.bytes()).sum(),
            sites,
        })
    }
}

/// `model.layers.0.self_attn.q_proj`, as PEFT sees the module; `root` is where the layers are ([`Decoder::layers_root`]).
pub(super) fn module_path(root: &str, layer: usize, site: usize) -> String {
    format!("{root}layers.{layer}.{}", site_path(site))
}

/// PEFT's name; `root` is where the layers are in Hugging Face's model ([`Decoder::layers_root`]).
fn tensor_name(root: &str, layer: usize, site: usize, part: char) -> String {
    format!("base_model.model.{root}layers.{layer}.{}.lora_{part}.weight", site_path(site))
}

/// Layer, and index into [`SITES`].
type Place = (usize, usize);
/// A, B and the factor of their product.
type Pair = (Tensor, Tensor, f64);

/// Layer, site and part (`A`, `B`) of a tensor name. A Gemma 3 that also sees has its text layers one name deeper.
fn parse_name(name: &str, layers: usize) -> Option<(usize, usize, char)> {
    let path = name.strip_prefix("base_model.model.")?;
    let roots = ["model.layers.", "model.language_model.layers.", "language_model.model.layers."];
    let path = roots.iter().find_map(|root| path.strip_prefix(root))?;
    let (layer, path) = path.split_once('.')?;
    let layer = layer.parse().ok().filter(|&layer| layer < layers)?;
    let (path, part) = match path.strip_suffix(".lora_A.weight") {
        Some(path) => (path, 'A'),
        None => (path.strip_suffix(".lora_B.weight")?, 'B'),
    };
    let site = (0..SITES.len()).find(|&site| site_path(site) == path)?;
    Some((layer, site, part))
}

/// The pairs of a file in f32 where they lie, once all of them fit the model: known names, A with its B, shapes, finite values.
fn checked(file: &AdapterFile, config: &ModelConfig) -> Result<Vec<(Place, Pair)>> {
    let mut found: BTreeMap<Place, ([Option<Tensor>; 2], f64)> = BTreeMap::new();
    for (name, tensor) in &file.tensors {
        let Some((layer, site, part)) = parse_name(name, config.num_hidden_layers) else {
            return Err(Error::unprocessable(
                name,
                format!(
                    "The adapter's tensor `{name}` has no place in this model, which has {} layers and takes LoRA on {}.",
                    config.num_hidden_layers,
                    SITES.join(", ")
                ),
            ));
        };
        // Patterns are of the model it was made for, whose name for the module the tensor bears.
        let path = name.strip_prefix("base_model.model.").unwrap_or(name);
        let path = path.rsplit_once(".lora_").map_or(path, |(path, _)| path);
        let (rank, scale) = file.config.rank_and_scale(path);
        let (input, out) = site_shape(config, site);
        let shape = if part == 'A' { [rank, input] } else { [out, rank] };
        if rank == 0 || tensor.dims() != shape {
            return Err(Error::unprocessable(
                name,
                format!(
                    "The adapter's tensor `{name}` has shape {:?}; this model and the adapter's rank want {shape:?}.",
                    tensor.dims()
                ),
            ));
        }
        let tensor = tensor.to_dtype(DType::F32)?;
        // A sum keeps any NaN or infinity it meets; finite f32 values cannot overflow it in f64.
        if !tensor.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?.is_finite() {
            return Err(Error::unprocessable(name, format!("The adapter's tensor `{name}` holds NaN or infinity.")));
        }
        let (parts, _) = found.entry((layer, site)).or_insert_with(|| (Default::default(), scale));
        if parts[usize::from(part == 'B')].replace(tensor).is_some() {
            return Err(Error::unprocessable(name, format!("The adapter's tensor `{name}` occurs twice.")));
        }
    }
    if found.is_empty() {
        return Err(Error::unprocessable("adapter_model.safetensors", "The adapter holds no LoRA tensors."));
    }
    let paired = found.into_iter().map(|((layer, site), (parts, scale))| match parts {
        [Some(a), Some(b)] => Ok(((layer, site), (a, b, scale))),
        [a, _] => {
            let (there, missing) = if a.is_some() { ('A', 'B') } else { ('B', 'A') };
            let (there, missing) =
                (tensor_name("model.", layer, site, there), tensor_name("model.", layer, site, missing));
            Err(Error::unprocessable(
                &there,
                format!("The adapter has the tensor `{there}` without its partner `{missing}`."),
            ))
        }
    });
    paired.collect()
}

/// Trainable A and B in f32.
pub struct LoraParams {
    /// The PEFT configuration.
    pub config: LoraConfig,
    /// `(layer, index into SITES)` → A: (R, in), B: (out, R).
    pub sites: BTreeMap<(usize, usize), (Var, Var)>,
    /// Factor of each site's product.
    scales: BTreeMap<(usize, usize), f64>,
    root: &'static str,
}

impl LoraParams {
    /// A from kaiming-uniform(a = √5) by `seed`, B zero; a target name the model does not have is an error naming it.
    pub fn new(config: &LoraConfig, model: &Decoder, seed: u64) -> Result<Self> {
        if let Some(name) = config.target_modules.iter().find(|name| !SITES.contains(&name.as_str())) {
            return Err(Error::invalid(
                "lora.target_modules",
                format!("`{name}` is not a module LoRA can be put on; the model has {}.", SITES.join(", ")),
            ));
        }
        let device = model.device();
        let targets = (0..SITES.len()).filter(|&site| config.target_modules.iter().any(|name| name == SITES[site]));
        let targets = targets.collect::<Vec<_>>();
        if targets.is_empty() {
            return Err(Error::invalid("lora.target_modules", "At least one target module is needed."));
        }
        let (mut sites, mut scales) = (BTreeMap::new(), BTreeMap::new());
        for layer in 0..model.config().num_hidden_layers {
            for &site in &targets {
                let (rank, scale) = config.rank_and_scale(&module_path(model.layers_root(), layer, site));
                if rank == 0 {
                    return Err(Error::invalid("lora.r", "The rank must be at least 1."));
                }
                let (input, out) = site_shape(model.config(), site);
                // One stream per site: what a site starts from does not depend on which others are trained.
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream((layer * SITES.len() + site) as u64);
                let bound = 1.0 / (input as f32).sqrt();
                let a: Vec<f32> = (0..rank * input).map(|_| rng.random_range(-bound..bound)).collect();
                let a = Var::from_vec(a, (rank, input), device)?;
                sites.insert((layer, site), (a, Var::zeros((out, rank), DType::F32, device)?));
                scales.insert((layer, site), scale);
            }
        }
        Ok(LoraParams { config: config.clone(), sites, scales, root: model.layers_root() })
    }

    /// Continues from a stored adapter.
    pub fn from_file(file: &AdapterFile, model: &Decoder) -> Result<Self> {
        let (mut sites, mut scales) = (BTreeMap::new(), BTreeMap::new());
        for (place, (a, b, scale)) in checked(file, model.config())? {
            let variable = |tensor: Tensor| -> Result<Var> {
                Ok(Var::from_tensor(&tensor.detach().copy()?.to_device(model.device())?)?)
            };
            sites.insert(place, (variable(a)?, variable(b)?));
            scales.insert(place, scale);
        }
        Ok(LoraParams { config: file.config.clone(), sites, scales, root: model.layers_root() })
    }

    /// How many variables each residual block has, in the order of [`LoraParams::named`].
    pub(crate) fn counts(&self, blocks: usize) -> Vec<usize> {
        let count = |block: usize| {
            let Range { start, end } = block_sites(block % 2);
            2 * self.sites.range((block / 2, start)..(block / 2, end)).count()
        };
        (0..blocks).map(count).collect()
    }

    /// A site's part beside its linear, if it has one.
    fn trained<'a>(&'a self, place: (usize, usize), base: &'a FrozenLinear) -> Option<Trained<'a>> {
        let (a, b) = self.sites.get(&place)?;
        Some(Trained { base: Some(base), a: a.as_tensor(), b: b.as_tensor(), scale: self.scales[&place] })
    }

    /// Deep copies under PEFT's tensor names.
    pub fn to_file(&self) -> Result<AdapterFile> {
        let copied = self.named().into_iter().map(|(name, variable)| {
            let tensor = variable.as_tensor().detach().copy()?.to_device(&Device::Cpu)?;
            Ok((name, tensor))
        });
        Ok(AdapterFile { config: self.config.clone(), tensors: copied.collect::<Result<_>>()? })
    }

    /// Variables in a fixed order (layer, site, A before B) with PEFT's names.
    pub fn named(&self) -> Vec<(String, Var)> {
        let named = |(&(layer, site), (a, b)): (&(usize, usize), &(Var, Var))| {
            [('A', a), ('B', b)].map(|(part, one)| (tensor_name(self.root, layer, site, part), one.clone()))
        };
        self.sites.iter().flat_map(named).collect()
    }
}

/// Contiguous rows of a flat step under one adapter.
#[derive(Clone)]
pub struct RowGroup {
    /// First row.
    pub start: usize,
    /// Rows.
    pub len: usize,
    /// The adapter; `None` for the base.
    pub adapter: Option<Arc<Adapter>>,
}

/// Which low-rank parts a step's rows get.
#[derive(Clone, Copy)]
pub enum LoraRows<'a> {
    /// The base model for all rows.
    Base,
    /// Serving: groups that cover all rows in order.
    Served(&'a [RowGroup]),
    /// Training: the variables for all rows; `dropout_seed` turns dropout on (a function of seed, layer, site, element).
    Train {
        /// The variables.
        params: &'a LoraParams,
        /// Seed of this pass's dropout masks; `None` turns dropout off.
        dropout_seed: Option<u64>,
    },
}

impl LoraRows<'_> {
    /// `base(x)` of several sites of a layer plus the low-rank part of the rows' adapter. x: (N, in) → (N, out) each.
    pub(crate) fn linears<const L: usize>(
        &self,
        layer: usize,
        of: [(usize, &FrozenLinear); L],
        x: &Tensor,
    ) -> Result<[Tensor; L]> {
        match *self {
            LoraRows::Base => linears(x, of.map(|(_, base)| (base, Vec::new())), &[]),
            LoraRows::Served(groups) => {
                let covered = groups.iter().try_fold(0, |at, group| (group.start == at).then_some(at + group.len));
                if covered != Some(x.dim(0)?) {
                    return Err(Error::internal("Row groups must cover all rows in order. This is a bug."));
                }
                // A GPU has no use for it.
                let first = of.first().filter(|_| x.device().is_cpu());
                let next = first.map(|(site, _)| sites_after(layer, *site)).into_iter().flatten();
                let soon = next.flat_map(|place| served(groups, place)).map(|(_, a, _)| a).collect::<Vec<_>>();
                linears(x, of.map(|(site, base)| (base, served(groups, (layer, site)))), &soon)
            }
            LoraRows::Train { params, dropout_seed } => {
                let dropout_seed = dropout_seed.filter(|_| params.config.lora_dropout > 0.0);
                let all = of.map(|(site, base)| params.trained((layer, site), base));
                let trained: std::result::Result<[Trained<'_>; L], _> =
                    all.into_iter().flatten().collect::<Vec<_>>().try_into();
                if let (None, Ok(trained)) = (dropout_seed, trained) {
                    return low_rank(x, trained);
                }
                let one = |((site, base), trained): ((usize, &FrozenLinear), Option<Trained<'_>>)| {
                    let Some(trained) = trained else { return base.forward(x) };
                    let [y] = match dropout_seed {
                        None => low_rank(x, [trained])?,
                        Some(seed) => {
                            let dropped = dropout(x, params.config.lora_dropout as f32, site_seed(seed, layer, site))?;
                            let [low] = low_rank(&dropped, [Trained { base: None, ..trained }])?;
                            [add(&base.forward(x)?, &low)?]
                        }
                    };
                    Ok(y)
                };
                let all = of.into_iter().zip(all).map(one).collect::<Result<Vec<_>>>()?;
                all.try_into().map_err(|_| Error::internal("a product for every site. This is a bug."))
            }
        }
    }
}

/// The rows that have a low-rank part at a site.
fn served(groups: &[RowGroup], place: (usize, usize)) -> Vec<ServedRows<'_>> {
    let adapted = groups.iter().filter_map(|group| Some((group, group.adapter.as_ref()?.sites.get(&place)?)));
    adapted.map(|(group, (a, b))| (group.start..group.start + group.len, a, b)).collect()
}

/// A dropout seed of its own for each site.
fn site_seed(seed: u64, layer: usize, site: usize) -> u64 {
    mixed(seed.wrapping_add(((layer * SITES.len() + site + 1) as u64).wrapping_mul(STEP)))
}
