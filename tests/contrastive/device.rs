//! The op on a device: vectors, scale and bias are parameters, whose gradients two batches are added to.

use std::collections::HashMap;

use half::bf16;

use trencadis::autograd::contrastive::contrastive;
use trencadis::autograd::device::BatchShape;
use trencadis::autograd::graph::{Graph, Tensor};
use trencadis::autograd::{CpuExecutor, DeviceExecutor, Plan, StepState};
use trencadis::cpu::contrastive::retrieved;
use trencadis::kernels::tolerance as to;
use trencadis::recipe::ContrastiveKind::{self, Sigmoid, Softmax};

use crate::support::devices::devices;
use crate::support::numbers::{alike, close};
use crate::support::{batch, param, random};

const USED: usize = 6;
const SLOTS: usize = 8;
const WIDTH: usize = 24;

fn graph(kind: ContrastiveKind) -> (Graph, Tensor) {
    let mut graph = Graph::new();
    let g = &mut graph;
    let (images, texts) = (param(g, "images", &[SLOTS, WIDTH]), param(g, "texts", &[SLOTS, WIDTH]));
    let scale = param(g, "scale", &[1]);
    let bias = (kind == Sigmoid).then(|| param(g, "bias", &[1]));
    let loss = contrastive(g, images, texts, scale, bias, kind);
    let mut roots = vec![(images, loss.dimages), (texts, loss.dtexts), (scale, loss.dscale)];
    roots.extend(bias.zip(loss.dbias));
    g.backward(&roots);
    g.keep(loss.per_pair);
    (graph, loss.per_pair)
}

#[test]
fn a_step_on_a_device_is_that_of_the_cpu() {
    let mut b = batch(&[[1, 1]; USED], 0, 3, 2, 0, SLOTS - USED);
    b.weights[2] = 0.0;
    b.weights[3] = 0.5;
    let step = StepState { seed: 0, loss_scale: 0.2 };
    for device in devices() {
        for kind in [Softmax, Sigmoid] {
            let (graph, per_pair) = graph(kind);
            let values: Vec<Vec<f64>> = graph
                .params()
                .iter()
                .enumerate()
                .map(|(i, p)| random(p.len(), i as u64).iter().map(|x| bf16::from_f64(*x).to_f64()).collect())
                .collect();
            let mut grads: Vec<Vec<f64>> = values.iter().map(|x| vec![0.0; x.len()]).collect();
            let mut cpu = CpuExecutor::<f64>::new();
            let plan = Plan::new(&graph);
            for _ in 0..2 {
                cpu.run(&graph, &plan, &values, &mut grads, &HashMap::new(), &b, &step);
            }

            let mut executor = DeviceExecutor::new(&device, &graph, BatchShape::of(&b), &|_| 0.0).unwrap();
            let narrow: Vec<Vec<f32>> =
                values.iter().map(|x| x.iter().map(|x| *x as f32).collect()).collect();
            executor.params().write(executor.stream(), &narrow).unwrap();
            executor.zero_grads().unwrap();
            executor.write(&b, &step).unwrap();
            executor.launch(0).unwrap();
            executor.launch(0).unwrap();
            executor.check().unwrap();
            let got = executor.read_grads().unwrap();
            for (p, (got, want)) in got.iter().zip(&grads).enumerate() {
                let got: Vec<f64> = got.iter().map(|x| f64::from(*x)).collect();
                match got.len() {
                    1 => close(&got, want, 1e-5),
                    _ => alike(&graph.params()[p].name, &got, want, to::CONTRASTIVE_GRAD),
                }
            }
            close(&executor.value(per_pair).unwrap(), cpu.value(per_pair), to::CONTRASTIVE);
            let ranks = retrieved(&values[0], &values[1], &b.weights, WIDTH);
            assert_eq!(executor.rank().download().unwrap(), ranks);
            assert!(ranks.iter().filter(|rank| **rank >= 0).count() == USED - 1);
        }
    }
}
