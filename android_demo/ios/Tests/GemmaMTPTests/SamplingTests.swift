// NOT RUN by this project, which has no Swift compiler.
import XCTest

@testable import GemmaMTP

/// Noise, choices, acceptance and half-precision numbers, on the test vectors of all languages where there are any.
final class SamplingTests: XCTestCase {
    private struct Vectors: Decodable {
        struct Noise: Decodable {
            let seed: String // as text: JSON numbers do not have 64 bits
            let position: Int
            let u_times_2_to_the_24: Int
        }

        struct Choice: Decodable {
            let temperature: Double
            let top_k: Int
            let top_p: Double
            let seed: String
            let position: Int
            let logits: [Float]
            let ids: [Int]
            let token: Int
        }

        let noise: [Noise]
        let choose: [Choice]
    }

    private func vectors() throws -> Vectors {
        var root = URL(fileURLWithPath: #filePath)
        for _ in 0..<5 { // Tests/GemmaMTPTests/SamplingTests.swift of android_demo/ios
            root.deleteLastPathComponent()
        }
        let file = root.appendingPathComponent("tests/vectors/sampling.json")
        return try JSONDecoder().decode(Vectors.self, from: Data(contentsOf: file))
    }

    func testNoise() throws {
        for noise in try vectors().noise {
            let actual = uniform(seed: UInt64(noise.seed)!, position: noise.position)
            XCTAssertEqual(actual * 16_777_216, Double(noise.u_times_2_to_the_24))
        }
    }

    func testChoices() throws {
        for choice in try vectors().choose {
            let sampling = try Sampling(
                temperature: choice.temperature, topP: choice.top_p, seed: UInt64(choice.seed)!, topK: choice.top_k
            )
            let rank = choose(choice.logits, position: choice.position, sampling: sampling)
            XCTAssertEqual(choice.ids[rank], choice.token)
        }
    }

    func testAcceptance() {
        for (drafts, choices, accepted, tokens) in [
            ([5, 6], [5, 6, 7], 2, [5, 6, 7]),
            ([5, 6], [5, 8, 7], 1, [5, 8]),
            ([5, 6], [4, 6, 7], 0, [4]),
            ([], [4], 0, [4]),
        ] as [([Int], [Int], Int, [Int])] {
            let actual = accept(drafts: drafts, choices: choices)
            XCTAssertEqual(actual.accepted, accepted)
            XCTAssertEqual(actual.tokens, tokens)
        }
    }

    func testHalfPrecisionScales() {
        let known: [(UInt16, Float)] = [(0x3C00, 1), (0xC000, -2), (0x0001, 5.960464477539063e-8), (0x7BFF, 65504)]
        for (half, wide) in known {
            XCTAssertEqual(halfToFloat(half), wide)
        }
    }
}
