package gemmamtp.hosttest;

import gemmamtp.core.*;
import gemmamtp.onnx.OnnxRuntime;
import java.io.File;
import java.util.List;

/** What an app does, in Java. Arguments: a bundle, a folder for what belongs to the device, a prompt, a session's file. */
public class JavaSample {
    public static void main(String[] arguments) {
        try (Decoder decoder = Decoders.openDecoder(new File(arguments[0]), new OnnxRuntime(), new File(arguments[1]))) {
            File session = new File(arguments[3]);
            Conversation conversation = session.exists() ? decoder.openSession(session) : decoder.conversation();
            Stream stream = decoder.getChat() == null
                    ? conversation.stream(arguments[2], decoder.options(40))
                    : conversation.chat(List.of(new Message("user", arguments[2])), decoder.options(40));
            while (stream.hasNext()) System.out.print(stream.next().getText());
            conversation.save(session);
        } catch (InputError error) {
            System.err.println(error.getMessage());
            System.exit(2);
        }
    }
}
