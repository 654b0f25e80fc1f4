// NOT COMPILED by this project: only its syntax was checked. It follows runtime_ref/sampling.py and acceptance.py.
import Foundation

/// How tokens are chosen; the default is greedy.
public struct Sampling {
    /// Logits that a bundle's target gives for each position.
    public static let maxTopK = 64

    /// Divides the logits, 0 or more; 0 is greedy.
    public var temperature: Double
    /// Keeps the most likely tokens whose probabilities together reach it, more than 0 and at most 1.
    public var topP: Double
    /// Seed of the noise.
    public var seed: UInt64
    /// How many of the largest logits are kept, 1 to `maxTopK`.
    public var topK: Int

    public init(temperature: Double = 0, topP: Double = 1, seed: UInt64 = 0, topK: Int = maxTopK) throws {
        guard temperature >= 0, temperature < .infinity else {
            throw InputError("temperature is \(temperature), expected 0 (greedy) or a positive number")
        }
        guard topP > 0, topP <= 1 else {
            throw InputError("top-p is \(topP), expected more than 0 and at most 1")
        }
        guard (1...Sampling.maxTopK).contains(topK) else {
            throw InputError("top-k is \(topK), expected 1 to \(Sampling.maxTopK): a bundle gives no more logits")
        }
        (self.temperature, self.topP, self.seed, self.topK) = (temperature, topP, seed, topK)
    }
}

/// Noise in [0, 1) for the token at a position of the whole text: the top 24 bits of SplitMix64 (Steele, Lea & Flood
/// 2014).
///
/// The same seed and position give the same number in every call, so that a token does not depend on whether it was
/// drafted.
public func uniform(seed: UInt64, position: Int) -> Double {
    let goldenGamma: UInt64 = 0x9E37_79B9_7F4A_7C15
    var x = (seed ^ (UInt64(position) &* goldenGamma)) &+ goldenGamma
    x = (x ^ (x >> 30)) &* 0xBF58_476D_1CE4_E5B9
    x = (x ^ (x >> 27)) &* 0x94D0_49BB_1331_11EB
    return Double((x ^ (x >> 31)) >> 40) / 16_777_216
}

/// Chooses a token from the largest logits of its position, in falling order; returns its index in `logits`.
///
/// Greedy takes the first. Sampling takes the first whose cumulative probability, after temperature, the top-k cut and
/// the top-p cut, exceeds the position's noise. Probabilities are doubles.
public func choose(_ logits: [Float], position: Int, sampling: Sampling) -> Int {
    if sampling.temperature == 0 {
        return 0
    }
    let weights = logits.prefix(sampling.topK).map { exp((Double($0) - Double(logits[0])) / sampling.temperature) }
    let sum = weights.reduce(0, +)
    var cumulative: [Double] = []
    for weight in weights {
        cumulative.append((cumulative.last ?? 0) + weight / sum)
    }
    let last = cumulative.firstIndex { $0 >= sampling.topP } ?? cumulative.count - 1
    let noise = uniform(seed: sampling.seed, position: position)
    return cumulative[...last].firstIndex { $0 / cumulative[last] > noise } ?? last
}

/// The length of the longest common prefix of two lists: the shorter length if one of them continues the other.
func commonPrefix(_ one: [Int], _ other: [Int]) -> Int {
    zip(one, other).prefix(while: { $0 == $1 }).count
}

/// Accepts the longest prefix of K drafts that equals the target's own K+1 choices, and adds the bonus token.
///
/// Returns how many drafts were accepted, and the tokens that the round adds.
public func accept(drafts: [Int], choices: [Int]) -> (accepted: Int, tokens: [Int]) {
    let accepted = commonPrefix(drafts, choices)
    return (accepted, Array(choices.prefix(accepted + 1)))
}
