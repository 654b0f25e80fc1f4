package gemmamtp.hosttest

import gemmamtp.core.InputError
import gemmamtp.core.Message
import gemmamtp.core.Options
import gemmamtp.core.openDecoder
import gemmamtp.onnx.OnnxRuntime
import java.io.File
import kotlin.system.exitProcess

/** What an app does, in Kotlin. Arguments: a bundle, a folder for what belongs to the device, a prompt, a session's file. */
fun main(arguments: Array<String>) {
    try {
        openDecoder(File(arguments[0]), OnnxRuntime(), deviceFolder = File(arguments[1])).use { decoder ->
            val session = File(arguments[3])
            val conversation = if (session.exists()) decoder.openSession(session) else decoder.conversation()
            val stream =
                if (decoder.chat == null) conversation.stream(arguments[2], Options(40))
                else conversation.chat(listOf(Message("user", arguments[2])), Options(40))
            for (token in stream) print(token.text)
            conversation.save(session)
        }
    } catch (error: InputError) {
        System.err.println(error.message)
        exitProcess(2)
    }
}
